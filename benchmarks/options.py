"""What a benchmark may be asked: its flags, which baselines each subject has, and what is refused."""

import dataclasses
import importlib.util
import itertools
import os
import platform
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

from benchmarks.compare import PROMPT, ROOT
from smollm_jax import errors
from smollm_jax.config import preset
from smollm_jax.config.recipe import Remat
from smollm_jax.data.text_sources import text_files
from smollm_jax.runtime import cpu

Other = Literal[
    "pytorch", "hf", "hf-compile", "hf-compile-max", "hf-compile-freeze",
    "hf-bf16", "hf-compile-bf16", "hf-compile-max-bf16", "hf-compile-freeze-bf16",
    "every-llamacpp", "llamacpp", "llamacpp-bf16", "llamacpp-q8_0", "llamacpp-q4_0",
    "twin", "twin-compile", "plain", "freed-memory",
    "remat-none", "remat-swiglu", "remat-dots", "remat-full", "tokenizers", "datasets",
]  # fmt: skip
HF_FLOAT32, TWIN = ("hf", "hf-compile", "hf-compile-max"), ("twin", "twin-compile")
HF = (*HF_FLOAT32, *(f"{name}-bf16" for name in HF_FLOAT32))
FREEZE = ("hf-compile-freeze", "hf-compile-freeze-bf16")
LLAMACPP = ("llamacpp", "llamacpp-bf16", "llamacpp-q8_0", "llamacpp-q4_0")
REMAT = {f"remat-{policy}": policy for policy in get_args(Remat)}
# Whom a subject can be measured against; the first is the default.
AGAINST = {"decode": (*HF, *LLAMACPP), "prefill": (*HF, *FREEZE, *LLAMACPP), "packed": ("plain",)}
AGAINST |= {"checkpoint": (), "prepare": ("tokenizers", "datasets"), "first-token": ("hf", "llamacpp")}
AGAINST |= {"startup": (*HF, *TWIN), "memory": (*HF, *TWIN, *REMAT), "train": (*HF, *TWIN, "freed-memory", *REMAT)}
AGAINST |= dict.fromkeys(("loss", "attention", "gemm"), HF)
LLAMACPP_MISSING = (
    "--against llamacpp needs it: CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python"
)


@dataclasses.dataclass(frozen=True)
class Flags:
    what: tyro.conf.Positional[
        Literal[
            "train",
            "memory",
            "decode",
            "prefill",
            "startup",
            "first-token",
            "loss",
            "attention",
            "packed",
            "gemm",
            "checkpoint",
            "prepare",
        ]
    ]
    """See above."""
    against: tuple[Other, ...] | None = None
    """transformers' LlamaForCausalLM with SDPA (default), smollm_torch ("-compile": under torch.compile, "-max": its
    max-autotune, "-freeze": with constant weights; "-bf16": under autocast, or with such weights), llama.cpp in float32
    or a type of its own; "pytorch", "every-llamacpp": all of them that this CPU has. "packed": our plain causal
    attention; "train": ourselves with glibc giving freed memory back, and as "memory" ourselves with another --remat.
    "prepare": one call of `tokenizers`, which writes nothing (default), and load_dataset and map of `datasets`.
    An empty list: ours alone."""
    preset: str = "smollm2-135m"
    """Model, with seeded random weights."""
    rounds: int = 5
    """Times each backend is measured, after warming up."""
    batch_size: int = 1
    """Sequences at once."""
    sequence_length: int = 256
    """Tokens a sequence."""
    new_tokens: int = 64
    """Tokens to decode."""
    document_tokens: int = 512
    """Mean length of a packed document."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the products. In training weights and moments stay float32 (transformers: autocast); else weights too."""
    quantize: Literal["bf16", "int8"] | None = None
    """Ours only, decoding: as in generate.py."""
    remat: Remat | None = None
    """Ours only: what a layer keeps for its backward pass; default: as in train_jax.py."""
    unroll: int | None = None
    """Ours only: layers unrolled per step of the layer scan; default: as in train_jax.py."""
    text: Path = ROOT / "assets/sotu"
    """Text, to prepare."""
    copies: int = 6
    """Times that text is there, as files of their own: less than 64 MB for every four cores does not fill them."""
    out: Path | None = None
    """JSON file to write."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""

    def workload(self, backend: str) -> dict[str, Any]:
        """What of all this reaches a backend: the fields of `benchmarks/workload.py`'s `Workload`."""
        ours_alone = ("against", "text", "out", "debug")
        flags = {key: value for key, value in dataclasses.asdict(self).items() if key not in ours_alone}
        dtype = self.dtype if backend == "ours" else self.dtype_of(backend)
        return flags | {"remat": REMAT.get(backend, self.remat), "dtype": dtype}

    def dtype_of(self, backend: str) -> str:
        """The dtype a backend computes in; of quantised weights, what to compare their results as."""
        if backend == "ours" and self.quantize:
            return "bfloat16"
        narrow = backend.startswith(("hf", "llamacpp-")) and backend.endswith(("-bf16", "-q8_0", "-q4_0"))
        return "bfloat16" if narrow else self.dtype

    @property
    def others(self) -> tuple[str, ...]:
        """Whom ours is measured against, groups by their members."""
        if self.against is None:
            return AGAINST[self.what][:1]
        fast = cpu.has_fast_bfloat16() or self.dtype == "bfloat16"
        hf = [name for name in AGAINST[self.what] if name.startswith("hf") and (fast or "bf16" not in name)]
        groups = {"pytorch": hf, "every-llamacpp": list(LLAMACPP)}
        return tuple(itertools.chain.from_iterable(groups.get(name, [name]) for name in self.against))


def check_flags(flags: Flags) -> None:
    for name in ("rounds", "batch_size", "sequence_length", "new_tokens", "document_tokens", "unroll", "copies"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise errors.UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if flags.quantize and (flags.what != "decode" or flags.dtype != "float32"):
        raise errors.UsageError("--quantize is for decode with --dtype float32")
    if flags.what == "decode" and flags.new_tokens < 2:
        raise errors.UsageError("--new-tokens must be at least 2: the first comes with the prompt and is not timed")
    for backend in flags.others:
        if backend not in AGAINST[flags.what]:
            allowed = f"only {', '.join(AGAINST[flags.what])}" if AGAINST[flags.what] else "nothing"
            raise errors.UsageError(f"{flags.what} cannot be measured --against {backend}, {allowed}")
    if flags.what == "prepare" and not flags.text.exists():
        raise errors.UsageError(f"--text {flags.text}: no such file or folder")
    if "datasets" in flags.others:
        if importlib.util.find_spec("datasets") is None:
            raise errors.UsageError("--against datasets needs it: pip install datasets")
        if {file.suffix for file in text_files(flags.text)} not in ({".txt"}, {".jsonl"}):
            raise errors.UsageError(f"--against datasets: {flags.text} is to be .txt files alone, or .jsonl alone")
    longest = PROMPT + flags.new_tokens if flags.what == "decode" else flags.sequence_length
    if longest > (most := preset(flags.preset).max_position_embeddings):
        raise errors.UsageError(f"{longest} tokens exceed the {most} positions of {flags.preset}")
    if "freed-memory" in flags.others and (platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ):
        raise errors.UsageError("--against freed-memory sets glibc's allocator: needs glibc, and GLIBC_TUNABLES unset")
    if any(name in LLAMACPP for name in flags.others):
        if flags.batch_size != 1:
            raise errors.UsageError("llama.cpp is measured with --batch-size 1 only")
        if importlib.util.find_spec("llama_cpp") is None:
            raise errors.UsageError(LLAMACPP_MISSING)
