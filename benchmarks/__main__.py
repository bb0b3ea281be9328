"""The process of one benchmark backend: `scripts/benchmark.py` starts it and requests each measurement by a line.

    python -m benchmarks BACKEND WORKLOAD WEIGHTS

Prints a line of JSON once it is ready. For each line of stdin it then runs one warm-up unit of work and one timed unit,
and prints the measurement as JSON.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.compare import busy_seconds
from benchmarks.workload import GEMM, Workload
from smollm_jax.runtime import allocator
from smollm_jax.runtime.program import run_main


def main() -> None:
    name, workload, weights = sys.argv[1], Workload(**json.loads(sys.argv[2])), Path(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print to stdout: only answers go to the pipe
    if name == "ours" and workload.training:
        allocator.retain_freed_memory()  # as the trainer does, before threads exist
    if workload.what == "prepare":
        from benchmarks.prepare_backend import prepare
    elif workload.what == "finetune" and name == "ours":
        from benchmarks.finetuning_jax import prepare
    elif workload.what == "finetune":
        from benchmarks.finetuning_trl import prepare
    elif name in ("ours", "plain", "freed-memory") or name.startswith("remat-"):
        from benchmarks.jax_backend import prepare
    elif name == "checkpoint":
        from benchmarks.checkpoint_backend import prepare
    elif name.startswith("llamacpp"):
        from benchmarks.llamacpp_backend import prepare
    else:
        from benchmarks.torch_backend import prepare
    unit, gemm, ready = prepare(name, workload, weights)
    print(json.dumps(ready), file=answers, flush=True)
    for _ in sys.stdin:
        tokens = workload.batch_size * workload.sequence_length
        answer = {"gemm": max(timed_gemm(gemm) for _ in range(3)), "tokens": tokens}
        if workload.what != "prepare":
            unit()  # warm-up: since its last turn another backend had the caches, and the system the freed memory
        began, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
        measured = unit()
        answer["seconds"] = seconds = time.perf_counter() - began
        answer["others"] = max(0.0, (busy_seconds() - busy - (time.process_time() - own)) / seconds)
        print(json.dumps(answer | measured), file=answers, flush=True)


def timed_gemm(gemm: Callable[[], int]) -> float:
    """FLOP/s of a matmul; `gemm` returns how many it ran."""
    began = time.perf_counter()
    return gemm() * 2 * GEMM**3 / (time.perf_counter() - began)


if __name__ == "__main__":
    run_main(main)
