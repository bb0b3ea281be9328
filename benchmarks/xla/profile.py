"""A trace of JAX's profiler, shared out over the instructions of the program that ran."""

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.xla.hlo import Program

CONTAINERS = {"while", "conditional", "call", "async-start", "async-done"}
Interval = tuple[float, float, str]  # nanoseconds, nanoseconds, instruction


def at_work(profile: Any, program: Program) -> Iterator[Interval]:
    """When each instruction was at work: on a GPU its kernels, on a CPU the calls."""
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in devices or [plane for plane in planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            for event in line.events:
                name = str(dict(event.stats).get("hlo_op", ""))
                if name in program.instructions and program.instructions[name].opcode not in CONTAINERS:
                    yield event.start_ns, event.start_ns + event.duration_ns, name


def shares(intervals: Iterable[Interval]) -> tuple[collections.Counter[str], float]:
    """Seconds of each instruction, and "idle", that add up to the whole; and the whole."""
    moments = sorted(moment for begin, end, name in intervals for moment in ((begin, 1, name), (end, -1, name)))
    seconds: Any = collections.Counter()
    active: collections.Counter[str] = collections.Counter()
    for (now, change, name), (then, _, _) in itertools.pairwise(moments):
        active[name] += change
        active += collections.Counter()  # drops what has ended
        for each, count in (active or {"idle": 1}).items():
            seconds[each] += (then - now) / 1e9 * count / (active.total() or 1)
    return seconds, sum(seconds.values())
