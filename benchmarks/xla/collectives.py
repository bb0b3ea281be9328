"""What devices send each other in a compiled program, read off its HLO text. Framework-free.

`scripts/check_scaling.py` prints it for a training step.
"""

import collections
from typing import NamedTuple

from benchmarks.xla.hlo import Instruction, Program, parse, size_in_bytes

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter")


class Collective(NamedTuple):
    """One collective instruction; `bytes` are those of the whole arrays: gathered, or before they are scattered."""

    kind: str
    bytes: int
    in_loop: bool  # in a loop's body or condition, or in what these call


def collectives(text: str) -> list[Collective]:
    """The collectives of `compiled.as_text()`, in its order; a start and its done are one.

    Raises `ValueError` when an operand is nowhere defined: this is not the text of a whole program then.
    """
    program = parse(text)
    looped = _computations_in_loops(program)
    return [
        Collective(each.opcode.removesuffix("-start"), _bytes(name, each, computation), name in looped)
        for name, computation in program.computations.items()
        for each in computation.values()
        if each.opcode.removesuffix("-start") in KINDS
    ]


def _computations_in_loops(program: Program) -> set[str]:
    """Bodies and conditions of loops, and all that these call."""
    calls, looped = collections.defaultdict(set), set()
    for name, computation in program.computations.items():
        for each in computation.values():
            for attribute, called in each.called.items():
                calls[name].update(called)
                if attribute in ("body", "condition"):
                    looped.update(called)
    while more := {called for name in looped for called in calls[name]} - looped:
        looped |= more
    return looped


def _bytes(name: str, each: Instruction, computation: dict[str, Instruction]) -> int:
    """Bytes of the whole arrays that a collective of the computation `name` takes or gives, whichever are more."""
    if missing := [operand for operand in each.operands if operand not in computation]:
        raise ValueError(f"{name}: {each.name} takes {missing[0]}, which is not defined before it")
    given = sum(size_in_bytes(computation[operand].shape) for operand in each.operands)
    total = size_in_bytes(each.shape)
    # A start may return what it was given beside what it will give.
    got = total - given if each.opcode.endswith("-start") and total > given else total
    return max(given, got)
