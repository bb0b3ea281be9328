"""One backend of a benchmark in a process of its own: `scripts/benchmark.py` starts it and gives it work by lines.

    python -m benchmarks BACKEND WORKLOAD WEIGHTS

Prepares, says so in a line of JSON, then answers each line of stdin with what one unit of work took, right after
another: steps of a training follow each other, too.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.workload import GEMM, Workload
from smollm_jax.runtime import allocator
from smollm_jax.runtime.program import run_main


def main() -> None:
    name, workload, weights = sys.argv[1], Workload(**json.loads(sys.argv[2])), Path(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if name == "ours" and workload.training:
        allocator.retain_freed_memory()  # as the trainer does, before there are threads
    if workload.what == "prepare":
        from benchmarks.prepare_backend import prepare
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
            unit()  # not timed: since the last turn the caches were another process's, and freed memory the system's
        began, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
        said = unit()
        answer["seconds"] = seconds = time.perf_counter() - began
        answer["others"] = max(0.0, (busy_seconds() - busy - (time.process_time() - own)) / seconds)
        print(json.dumps(answer | said), file=answers, flush=True)


def timed_gemm(gemm: Callable[[], int]) -> float:
    """FLOP/s of a matrix product; `gemm` says how many it did."""
    began = time.perf_counter()
    return gemm() * 2 * GEMM**3 / (time.perf_counter() - began)


def busy_seconds() -> float:
    """How long this machine's cores have worked, for whatever process."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:8])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    run_main(main)
