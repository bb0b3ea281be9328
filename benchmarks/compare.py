"""The parent of the backends' processes: starts them, checks that they do equal work, computes ratios per round."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smollm_jax import errors

PROMPT = 16  # tokens of a prompt to decode from
ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # between two backends' results, relative
Rows = dict[str, dict[str, float]]


class Backend:
    """A backend in its own process, because torch and JAX in one process conflict over cuDNN on a GPU (jax#19004).

    The process is stopped between its turns, so that threads that spin while they wait take no core from the others.
    """

    def __init__(self, name: str, workload: dict[str, Any], weights: Path, **environment: str):
        self.name = name
        command = [sys.executable, "-m", "benchmarks", name, json.dumps(workload), str(weights)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process: Any = subprocess.Popen(command, env=process_environment(**environment), **pipes)
        self.ready = self._read_answer()

    def run_once(self) -> dict[str, Any]:
        """The measurement of one unit of work."""
        self.process.send_signal(signal.SIGCONT)
        print("go", file=self.process.stdin, flush=True)
        return self._read_answer()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _read_answer(self) -> dict[str, Any]:
        if line := self.process.stdout.readline():
            self.process.send_signal(signal.SIGSTOP)
            return json.loads(line)
        raise errors.SmolLMError(f"backend {self.name} ended with status {self.process.wait()}; its output is above")


def process_environment(**variables: str) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    return os.environ | settings | variables


def write_weights(preset: str, folder: Path, *, gguf: bool = False, tokenizer: bool = False) -> Path:
    """Writes a Hugging Face folder of seeded random weights, in processes that do not use the GPU; returns its path.

    `tokenizer` adds SmolLM2's tokenizer, `gguf` adds that and `model.gguf`.
    """
    out, variables = folder / "weights", process_environment(JAX_PLATFORMS="cpu")
    command = [sys.executable, ROOT / "scripts/random_weights.py", "--preset", preset, "--out", out]
    if gguf or tokenizer:  # every GGUF contains one
        command += ["--tokenizer", ROOT / "assets/tokenizer"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=variables)
    if gguf:
        command = [sys.executable, ROOT / "scripts/convert_weights.py", out, out / "model.gguf"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=variables)
    return out


def peak_memory(pid: int, work: Callable[[], Any]) -> tuple[Any, int]:
    """What `work` returns, and the peak memory in bytes of a process and its descendants, sampled 50 times a second.

    Only anonymous memory counts: a page that processes share counts once, a page of a mapped file not at all.
    """
    peaks, done = [0], threading.Event()

    def sample() -> None:
        peaks.append(sum(map(anonymous_bytes, descendants(pid))))  # at least once, however short the work is
        while not done.wait(0.02):
            peaks.append(sum(map(anonymous_bytes, descendants(pid))))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        returned = work()
    finally:
        done.set()
        sampler.join()
    if not max(peaks):
        raise errors.SmolLMError(f"/proc/{pid}/smaps_rollup: this system does not report the memory of a process")
    return returned, max(peaks)


def descendants(pid: int) -> list[int]:
    """The ids of a process and of all its descendants."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    pids = [pid]
    for each in pids:  # the list grows during the loop
        pids += children.get(each, [])
    return pids


def anonymous_bytes(pid: int) -> int:
    """Bytes of a process's anonymous memory, with its share of shared pages; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def busy_seconds() -> float:
    """Seconds that this machine's cores have worked, for all processes."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:8])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def check_equal(dtypes: dict[str, str], ready: dict[str, dict[str, Any]]) -> None:
    """Raises unless every backend computes what ours does: losses and samples within `TOLERANCE`, on the same platform.

    `dtypes` are the backends' data types; the less exact of two sets the tolerance. In float32 decoded token ids must
    be equal too; in bfloat16 rounding decides near-ties.
    """
    ours = ready["ours"]
    for name, other in ready.items():
        dtype = max(dtypes["ours"], dtypes[name], key=TOLERANCE.__getitem__)
        if ours["platform"] != other["platform"]:
            raise errors.UsageError(f"ours is on a {ours['platform']}, {name} on a {other['platform']}: not comparable")
        for step, (a, b) in enumerate(zip(ours["losses"], other["losses"], strict=True), 1):
            if not abs(a - b) <= TOLERANCE[dtype] * abs(b):  # raises for NaN too
                raise errors.SmolLMError(
                    f"loss {step} is {a:.6f} for ours and {b:.6f} for {name}, a difference of more than "
                    f"{TOLERANCE[dtype]:g} relative ({dtype}): not the same work, so not compared"
                )
        for what, numbers in other.get("samples", {}).items():
            difference = max(abs(a - b) for a, b in zip(ours["samples"][what], numbers, strict=True))
            if not difference <= TOLERANCE[dtype] * max(map(abs, numbers)):
                raise errors.SmolLMError(f"{what} of ours and of {name} differ by {difference:.2g}: not the same work")
        if dtype == "float32" and ours.get("ids") != other.get("ids"):
            raise errors.SmolLMError(f"ours and {name} decode different tokens: not the same work, so not compared")


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def with_ratios(what: str, values: dict[str, list[float]], best: Callable[..., str] = max) -> Rows:
    """A row for each backend, the ratio of ours to each other one, computed per round, and that to the best of several.

    The best has the best median: `best` is `max` where more is better, else `min`.
    """
    rows = {f"{what}, {name}": spread(numbers) for name, numbers in values.items()}
    ratios = {
        name: spread([a / b for a, b in zip(values["ours"], numbers, strict=True)])
        for name, numbers in values.items()
        if name != "ours"
    }
    rows |= {f"{what}, ours / {name}": ratio for name, ratio in ratios.items()}
    if len(ratios) > 1:
        fastest = best(ratios, key=lambda name: statistics.median(values[name]))
        rows[f"{what}, ours / the best, {fastest}"] = ratios[fastest]
    return rows
