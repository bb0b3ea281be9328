"""Attributes the time in a trace of JAX's profiler to the instructions of the program that ran."""

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.xla.hlo import Program

CONTAINERS = {"while", "conditional", "call", "async-start", "async-done"}
Interval = tuple[float, float, str]  # start and end in nanoseconds, instruction


def busy_intervals(profile: Any, program: Program) -> Iterator[Interval]:
    """The intervals in which each instruction ran: on a GPU its kernels, on a CPU its calls."""
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in devices or [plane for plane in planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            for event in line.events:
                name = str(dict(event.stats).get("hlo_op", ""))
                if name in program.instructions and program.instructions[name].opcode not in CONTAINERS:
                    yield event.start_ns, event.start_ns + event.duration_ns, name


def attribute_time(intervals: Iterable[Interval]) -> tuple[collections.Counter[str], float]:
    """Seconds per instruction, with "idle", and their sum. Instructions that run at once share the time equally."""
    changes = sorted(change for begin, end, name in intervals for change in ((begin, 1, name), (end, -1, name)))
    seconds: Any = collections.Counter()
    active: collections.Counter[str] = collections.Counter()
    for (now, change, name), (next_time, _, _) in itertools.pairwise(changes):
        active[name] += change
        active += collections.Counter()  # drops instructions that have ended
        for each, count in (active or {"idle": 1}).items():
            seconds[each] += (next_time - now) / 1e9 * count / (active.total() or 1)
    return seconds, sum(seconds.values())
