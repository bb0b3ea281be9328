"""Benchmark this package against PyTorch and others, alternating in one run; prints medians with their spread.

    python scripts/benchmark.py train --against pytorch                  # seconds, tokens/s and MFU of optimizer steps
    python scripts/benchmark.py train --against freed-memory             # ours with glibc returning freed memory
    python scripts/benchmark.py train --against remat-none remat-full    # ours with other remat policies
    python scripts/benchmark.py memory --sequence-length 2048            # peak memory of such steps
    python scripts/benchmark.py decode --against hf every-llamacpp       # greedy tokens after a prompt of 16, cached
    python scripts/benchmark.py decode --quantize int8 --against llamacpp-q8_0
    python scripts/benchmark.py prefill --sequence-length 2048           # one forward pass that fills a cache
    python scripts/benchmark.py startup --against hf-compile --rounds 1  # process start to the end of the first step
    python scripts/benchmark.py first-token --against hf llamacpp        # process start to the first token generated
    python scripts/benchmark.py loss --sequence-length 2048              # the loss of the head and its gradients
    python scripts/benchmark.py attention --sequence-length 2048         # one layer's causal attention and gradients
    python scripts/benchmark.py packed --sequence-length 2048            # the same within documents, to plain causal
    python scripts/benchmark.py gemm --sequence-length 2048              # each matmul of the model
    python scripts/benchmark.py checkpoint                               # the manifest and the check for finite numbers
    python scripts/benchmark.py prepare --against tokenizers datasets    # tokenising text into a data set
    python scripts/benchmark.py finetune --against every-trl --method lora --batch-size 2 --sequence-length 512
    python scripts/benchmark.py serve --against transformers llama-server   # requests of 1, 4 and 16 clients at once

Each backend runs in its own process with the same seeded weights, tokens and optimizer (AdamW, clip 1.0, float32 state,
fused in PyTorch). The script checks that their results agree before it times anything. One process runs at a time, the
others are stopped. Prints a table and writes it, with versions, the CPU's name and the command, to benchmarks/results/.
Compare only ratios within one run: the speed of a shared machine changes.
"""

import contextlib
import itertools
import json
import signal
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: `benchmarks` is in no wheel

from benchmarks.compare import process_environment
from benchmarks.options import Flags, check_flags
from benchmarks.serving import serve, version_of
from benchmarks.starts import first_token, startup
from benchmarks.subjects import checkpoint, finetune, memory, prepare, speed
from smollm_jax.commands import command_line
from smollm_jax.runs.provenance import environment
from smollm_jax.runtime import cpu
from smollm_jax.runtime.program import run_main

PACKAGES = (
    "torch",
    "transformers",
    "llama-cpp-python",
    "tokenizers",
    "datasets",
    "trl",
    "peft",
    "llguidance",
    "uvicorn",
)
SETTINGS = (
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "GLIBC_TUNABLES",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "PYTHONDONTWRITEBYTECODE",
)


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__)
    check_flags(flags)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # sent by a time limit: clean up before exiting
    special = {"finetune": finetune, "startup": startup, "first-token": first_token, "memory": memory}
    special |= {"checkpoint": checkpoint, "prepare": prepare, "serve": serve}
    measure = special.get(flags.what, speed)
    with tempfile.TemporaryDirectory(dir=".", prefix=".benchmark-") as folder:  # not in /tmp, which may be in memory
        device, rows = measure(flags, Path(folder).resolve())
    for name, row in rows.items():
        print(f"{name:44} {'  '.join(f'{what} {value:.4g}' for what, value in row.items())}")
    size = f"-{flags.batch_size}x{flags.new_tokens if flags.what == 'decode' else flags.sequence_length}"
    size = "" if flags.what in ("checkpoint", "prepare", "first-token", "serve") else size
    what = f"{flags.what}-{flags.method}" if flags.what == "finetune" else flags.what
    name = f"{what}{size}-{device.lower().replace(' ', '-')}-{time.strftime('%Y-%m-%d')}.json"
    out = flags.out or unused(Path("benchmarks/results") / name)
    versions = environment(device, 1) | {"cpu": cpu.name(), "cpu_features": cpu.features()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    if "llama-server" in flags.baselines:
        versions["llama-server"] = version_of(flags.llama_server)
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
    """`path`, or, where that exists, the same with the first free number."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())


if __name__ == "__main__":
    run_main(main)
