"""The parent's end of the backends' processes: it starts them, refuses unequal work, and divides round by round."""

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

PROMPT = 16  # tokens before the decoded ones
ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # between two backends' results, relative
Rows = dict[str, dict[str, float]]


class Backend:
    """A backend in a process of its own, ready: torch and JAX in one fight over cuDNN on a GPU (jax#19004).

    While it is not its turn the process is stopped, so that threads that spin while they wait take nobody's core.
    """

    def __init__(self, name: str, workload: dict[str, Any], weights: Path, **environment: str):
        self.name = name
        command = [sys.executable, "-m", "benchmarks", name, json.dumps(workload), str(weights)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process: Any = subprocess.Popen(command, env=process_environment(**environment), **pipes)
        self.ready = self._answer()

    def run_once(self) -> dict[str, Any]:
        """What one unit of work took."""
        self.process.send_signal(signal.SIGCONT)
        print("go", file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        if line := self.process.stdout.readline():
            self.process.send_signal(signal.SIGSTOP)
            return json.loads(line)
        raise errors.SmolLMError(f"side {self.name} ended with status {self.process.wait()}; what it said is above")


def process_environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ours = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    return os.environ | ours | more


def write_weights(preset: str, folder: Path, *, gguf: bool = False, tokenizer: bool = False) -> Path:
    """A Hugging Face folder of seeded weights, made in processes that leave the GPU alone.

    With SmolLM2's tokenizer, and with `model.gguf`, in it where asked for.
    """
    out, variables = folder / "weights", process_environment(JAX_PLATFORMS="cpu")
    command = [sys.executable, ROOT / "scripts/random_weights.py", "--preset", preset, "--out", out]
    if gguf or tokenizer:  # a GGUF needs one, used or not
        command += ["--tokenizer", ROOT / "assets/tokenizer"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=variables)
    if gguf:
        command = [sys.executable, ROOT / "scripts/convert_weights.py", out, out / "model.gguf"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=variables)
    return out


def most_memory(pid: int, work: Callable[[], Any]) -> tuple[Any, int]:
    """What `work` returns, and the most bytes that a process and its descendants held meanwhile, 50 looks a second.

    Held is what no file backs: a page that several share counts once, one of a mapped file not at all.
    """
    peaks, done = [0], threading.Event()

    def look() -> None:
        peaks.append(sum(map(held, descendants(pid))))  # once at least, however short the work
        while not done.wait(0.02):
            peaks.append(sum(map(held, descendants(pid))))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        returned = work()
    finally:
        done.set()
        looking.join()
    if not max(peaks):
        raise errors.SmolLMError(f"/proc/{pid}/smaps_rollup: this system does not say what a process holds")
    return returned, max(peaks)


def descendants(pid: int) -> list[int]:
    """A process, its children, theirs and so on."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for each in found:  # which grows meanwhile
        found += children.get(each, [])
    return found


def held(pid: int) -> int:
    """Bytes of a process's memory that no file backs, its share of what it shares; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def check_equal(dtypes: dict[str, str], ready: dict[str, dict[str, Any]]) -> None:
    """Raises unless every backend does what ours does: losses and samples within `TOLERANCE`, on one kind of device.

    `dtypes` are the backends'; the less exact of two sets the tolerance. In float32 decoded token ids must be equal
    too; in bfloat16 rounding decides near-ties.
    """
    ours = ready["ours"]
    for name, other in ready.items():
        dtype = max(dtypes["ours"], dtypes[name], key=TOLERANCE.__getitem__)
        if ours["platform"] != other["platform"]:
            raise errors.UsageError(f"ours is on a {ours['platform']}, {name} on a {other['platform']}: not comparable")
        for step, (a, b) in enumerate(zip(ours["losses"], other["losses"], strict=True), 1):
            if not abs(a - b) <= TOLERANCE[dtype] * abs(b):  # a NaN too is refused
                raise errors.SmolLMError(
                    f"loss {step} is {a:.6f} for ours and {b:.6f} for {name}, apart by more than "
                    f"{TOLERANCE[dtype]:g} relative ({dtype}): not the same work, so not compared"
                )
        for what, numbers in other.get("samples", {}).items():
            apart = max(abs(a - b) for a, b in zip(ours["samples"][what], numbers, strict=True))
            if not apart <= TOLERANCE[dtype] * max(map(abs, numbers)):
                raise errors.SmolLMError(f"{what} of ours and of {name} are {apart:.2g} apart: not the same work")
        if dtype == "float32" and ours.get("ids") != other.get("ids"):
            raise errors.SmolLMError(f"ours and {name} decode different tokens: not the same work, so not compared")


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def with_ratios(what: str, values: dict[str, list[float]], best: Callable[..., str] = max) -> Rows:
    """A row a backend, one of ours over each other backend's, divided round by round, and one over the best of several.

    `best` is `max` where more is better, else `min`; of medians.
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
