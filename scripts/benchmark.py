"""Measure one thing on our side and on PyTorch's, in turn in one run, medians with their spread.

    python scripts/benchmark.py train --against pytorch                  # seconds, tokens/s and MFU of optimizer steps
    python scripts/benchmark.py train --against freed-memory             # ours, giving freed memory back
    python scripts/benchmark.py train --against remat-none remat-full    # ours with each way to rematerialise
    python scripts/benchmark.py memory --sequence-length 2048            # the most memory such steps take
    python scripts/benchmark.py decode --against hf every-llamacpp       # tokens after a prompt of 16, greedy, cached
    python scripts/benchmark.py decode --quantize int8 --against llamacpp-q8_0
    python scripts/benchmark.py prefill --sequence-length 2048           # one forward pass that fills a cache
    python scripts/benchmark.py startup --against hf-compile --rounds 1  # process start to the end of the first step
    python scripts/benchmark.py first-token --against hf llamacpp        # process start to the first token generated
    python scripts/benchmark.py loss --sequence-length 2048              # the head's loss and its gradients
    python scripts/benchmark.py attention --sequence-length 2048         # one layer's causal attention, both ways
    python scripts/benchmark.py packed --sequence-length 2048            # the same within documents, over plain causal
    python scripts/benchmark.py gemm --sequence-length 2048              # each product of the model: what a step allows
    python scripts/benchmark.py checkpoint                               # what the manifest and the step's guard cost
    python scripts/benchmark.py prepare --against tokenizers datasets    # text to a data set, over both

Each side is a process of its own with the same seeded weights, tokens and optimizer (AdamW, clip 1.0, float32 state,
fused in PyTorch); results that differ are refused before anything is timed. One process runs at a time, the others are
stopped. Prints a table and writes it, with versions, the CPU's name and the command, to benchmarks/. Only ratios of one
run mean anything: machines are shared, their speed changes.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import tyro
from measure.sides import Rows, Side, check_equal, most_memory, process_environment, spread, with_ratios, write_weights
from measure.starts import first_token, startup

from smollm_jax import command_line, cost, cpu, errors
from smollm_jax.config import preset
from smollm_jax.provenance import environment
from smollm_jax.text import documents, text_files

ROOT = Path(__file__).resolve().parent.parent
PROMPT = 16  # tokens before the decoded ones
SETTINGS = (
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "GLIBC_TUNABLES",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "PYTHONDONTWRITEBYTECODE",
)
Remat = Literal["none", "swiglu", "dots", "full"]
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
    """Times each side is measured, after warming up."""
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
    """Ours only: layers laid out per step of the layer scan; default: as in train_jax.py."""
    text: Path = ROOT / "assets/sotu"
    """Text, to prepare."""
    copies: int = 6
    """Times that text is there, as files of their own: less than 64 MB for every four cores does not fill them."""
    out: Path | None = None
    """JSON file to write."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""

    def job(self, side: str) -> dict[str, Any]:
        """What of all this reaches a side: the fields of `measure/job.py`'s `Job`."""
        ours_alone = ("against", "text", "out", "debug")
        flags = {key: value for key, value in dataclasses.asdict(self).items() if key not in ours_alone}
        dtype = self.dtype if side == "ours" else self.dtype_of(side)
        return flags | {"remat": REMAT.get(side, self.remat), "dtype": dtype}

    def dtype_of(self, side: str) -> str:
        """The dtype a side computes in; of quantised weights, what to compare their results as."""
        if side == "ours" and self.quantize:
            return "bfloat16"
        narrow = side.startswith(("hf", "llamacpp-")) and side.endswith(("-bf16", "-q8_0", "-q4_0"))
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


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__)
    check_flags(flags)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time limit's: leave nothing behind
    special = {"startup": startup, "first-token": first_token, "memory": memory}
    measure = (special | {"checkpoint": checkpoint, "prepare": prepare}).get(flags.what, speed)
    with tempfile.TemporaryDirectory(dir=".", prefix=".benchmark-") as folder:  # on a disk: /tmp may be memory
        device, rows = measure(flags, Path(folder).resolve())
    for name, row in rows.items():
        print(f"{name:44} {'  '.join(f'{what} {value:.4g}' for what, value in row.items())}")
    size = f"-{flags.batch_size}x{flags.new_tokens if flags.what == 'decode' else flags.sequence_length}"
    size = "" if flags.what in ("checkpoint", "prepare", "first-token") else size
    name = f"{flags.what}{size}-{device.lower().replace(' ', '-')}-{time.strftime('%Y-%m-%d')}.json"
    out = flags.out or unused(Path("benchmarks") / name)
    versions = environment(device, 1) | {"cpu": cpu.name(), "cpu_features": cpu.features()}
    for package in ("torch", "transformers", "llama-cpp-python", "tokenizers", "datasets"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    content = {
        "command": f"python scripts/benchmark.py {' '.join(argv if argv is not None else sys.argv[1:])}",
        "date": time.strftime("%Y-%m-%d"),
        "environment": versions,
        "settings": {name: value for name, value in process_environment().items() if name in SETTINGS},
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {out}")


def unused(path: Path) -> Path:
    """`path`, or where another measurement of the day has it, the next free one with a number."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())


def check_flags(flags: Flags) -> None:
    for name in ("rounds", "batch_size", "sequence_length", "new_tokens", "document_tokens", "unroll", "copies"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise errors.UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if flags.quantize and (flags.what != "decode" or flags.dtype != "float32"):
        raise errors.UsageError("--quantize is for decode with --dtype float32")
    if flags.what == "decode" and flags.new_tokens < 2:
        raise errors.UsageError("--new-tokens must be at least 2: the first comes with the prompt and is not timed")
    for side in flags.others:
        if side not in AGAINST[flags.what]:
            allowed = f"only {', '.join(AGAINST[flags.what])}" if AGAINST[flags.what] else "nothing"
            raise errors.UsageError(f"{flags.what} cannot be measured --against {side}, {allowed}")
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


def speed(flags: Flags, folder: Path) -> tuple[str, Rows]:
    """tokens/s first, then seconds, FLOP/s, and beside each round what else moved: a lone GEMM, other processes."""
    kernels = flags.what in ("loss", "attention", "packed", "gemm")
    gguf = any(name in LLAMACPP for name in flags.others)
    weights = folder if kernels else write_weights(flags.preset, folder, gguf=gguf)
    with contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name in ("ours", *flags.others):
            print(f"{name}: preparing", flush=True)
            sides[name] = Side(name, flags.job(name), weights)
            stack.callback(sides[name].close)
        ready = {name: side.ready for name, side in sides.items()}
        check_equal({name: flags.dtype_of(name) for name in sides}, ready)
        rounds = [{name: side.go() for name, side in sides.items()} for _ in range(flags.rounds)]
    device = ready["ours"]["device"]

    def each(value: Callable[[dict[str, Any]], float]) -> dict[str, list[float]]:
        return {name: [value(answers[name]) for answers in rounds] for name in sides}

    if flags.what == "gemm":
        rows: Rows = {}
        for name in rounds[0]["ours"]["rates"]:
            rows |= with_ratios(f"GFLOP/s {name}", each(lambda x, name=name: x["rates"][name] / 1e9))
        rows |= with_ratios("ceiling tokens/s", each(lambda x: x["tokens"] / x["seconds"]))
        rest = {}
    else:
        rows = with_ratios("tokens/s", each(lambda x: x["tokens"] / x["seconds"]))
        rest = {"seconds": each(lambda x: x["seconds"])}
    if flops := ready["ours"].get("flops"):
        rest["GFLOP/s"] = each(lambda x: flops / x["seconds"] / 1e9)
    if flags.what == "train":
        # The convention: 3 x forward, every matrix product, the head's and attention's causal half too, no remat.
        flops = cost.flops_per_token(preset(flags.preset), flags.sequence_length)
        peak = cost.peak_flops(device, flags.dtype)
        title = "MFU of the bf16 peak" if peak else "MFU of the GEMM's speed"
        rest[title] = each(lambda x: flops * x["tokens"] / x["seconds"] / (peak or x["gemm"]))
    rest |= {"GEMM GFLOP/s": each(lambda x: x["gemm"] / 1e9), "cores others took": each(lambda x: x["others"])}
    for step in range(len(ready["ours"]["losses"])):
        rest[f"loss {step + 1}"] = {name: [ready[name]["losses"][step]] for name in sides}
    return device, rows | {f"{what}, {name}": spread(v) for what, of in rest.items() for name, v in of.items()}


def memory(flags: Flags, folder: Path) -> tuple[str, Rows]:
    """The most memory of two training steps, compiling included: resident on a CPU, the allocator's peak on a GPU."""
    weights, names = write_weights(flags.preset, folder), ("ours", *flags.others)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(flags.rounds):
        for name in names:
            side = Side(name, flags.job(name), weights)
            side.close()  # one at a time: two could be more than the machine has
            found[name].append(side.ready)
            if None in (side.ready["before_bytes"], side.ready["peak_bytes"]):
                raise errors.SmolLMError(f"memory: {name} does not say how much it takes: its allocator keeps no count")
        check_equal({name: flags.dtype_of(name) for name in names}, {name: found[name][-1] for name in names})
    peaks = {name: [x["peak_bytes"] / 1e9 for x in of] for name, of in found.items()}
    rows = with_ratios("peak GB", peaks, min)
    for name, of in found.items():  # no ratio: PyTorch allocates AdamW's moments in the first step, we before it
        rows[f"GB above before the step, {name}"] = spread([(x["peak_bytes"] - x["before_bytes"]) / 1e9 for x in of])
    for name, of in found.items():
        if "program_bytes" in of[0]:
            rows[f"GB of the compiled step, {name}"] = spread([x["program_bytes"] / 1e9 for x in of])
    return found["ours"][0]["device"], rows


def checkpoint(flags: Flags, folder: Path) -> tuple[str, Rows]:
    """What the manifest adds to a save and to a restore, and the check for finite numbers to a step."""
    side = Side("checkpoint", flags.job("ours"), folder / "none")
    side.close()
    times = side.ready["times"]
    rows = {f"{name}, seconds": spread(of) for name, of in times.items()}
    for name, a, b in (
        ("manifest / save", "manifest", "save"),
        ("verify / save", "verify", "save"),
        ("step guarded / unguarded", "guarded", "unguarded"),
    ):
        rows[name] = spread([x / y for x, y in zip(times[a], times[b], strict=True)])
    return side.ready["device"], rows


def prepare(flags: Flags, folder: Path) -> tuple[str, Rows]:
    """MB/s of text to a data set, in turn, and the most memory of it in a round before, which is not timed."""
    text, copies = flags.text.resolve(), folder / "text"
    files = text_files(text)
    for copy, file in itertools.product(range(flags.copies), files):  # no links: a file is read once
        target = copies / f"{copy}-{text.name}" / file.relative_to(text)  # of a file: "."
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    size = flags.copies * sum(len(one.encode()) for file in files for one in documents(file)) / 1e6
    caches = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    more = {"datasets": caches | {"TOKENIZERS_PARALLELISM": "false"}}  # a process a core, and no threads beside it
    with contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name in ("ours", *flags.others):
            sides[name] = Side(name, flags.job(name), copies, **more.get(name, {}))
            stack.callback(sides[name].close)
        peaks: dict[str, list[float]] = {}
        rounds: list[dict[str, Any]] = [{}]
        for name, side in sides.items():
            rounds[0][name], peak = most_memory(side.process.pid, side.go)
            peaks |= {name: [peak / 1e9]} if name != "tokenizers" else {}  # which holds all texts
        check_same_tokens(rounds[0])
        for _ in range(flags.rounds):
            rounds.append({name: side.go() for name, side in sides.items()})
            check_same_tokens(rounds[-1])
        device = sides["ours"].ready["device"]
    rows = with_ratios("peak GB", peaks, min)
    for what, seconds in (("MB/s", "seconds"), ("MB/s of a core", "cpu")):
        rows |= with_ratios(what, {name: [size / answers[name][seconds] for answers in rounds[1:]] for name in sides})
    return device, rows


def check_same_tokens(answers: dict[str, dict[str, Any]]) -> None:
    """Raises unless every side made as many tokens of the text as ours."""
    ours = answers["ours"]["tokens"]
    for name, other in answers.items():
        if (theirs := other["tokens"]) != ours:
            raise errors.SmolLMError(f"ours makes {ours} tokens, {name} {theirs}: not the same work, so not compared")


if __name__ == "__main__":
    errors.run(main)
