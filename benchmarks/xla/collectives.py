"""The collectives of a compiled program, from its HLO text. Framework-free.

`scripts/check_scaling.py` prints those of a training step.
"""

import collections
from typing import NamedTuple

from benchmarks.xla.hlo import Instruction, Program, parse, size_in_bytes

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter")


class Collective(NamedTuple):
    """One collective; `bytes` is the size of the whole arrays: after a gather, before a scatter."""

    kind: str
    bytes: int
    in_loop: bool  # in a loop's body or condition, or in a computation called from there


def collectives(text: str) -> list[Collective]:
    """The collectives of `compiled.as_text()` in order; an asynchronous start and its done count as one.

    Raises `ValueError` when an operand is not defined, as in the text of half a program.
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
    """The bodies and conditions of loops, and all computations called from them."""
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
    """Bytes of a collective's operands or results, whichever is larger; `name` is its computation."""
    if missing := [operand for operand in each.operands if operand not in computation]:
        raise ValueError(f"{name}: operand {missing[0]} of {each.name} is not defined")
    operands = sum(size_in_bytes(computation[operand].shape) for operand in each.operands)
    total = size_in_bytes(each.shape)
    # A start can return its operands together with its results.
    results = total - operands if each.opcode.endswith("-start") and total > operands else total
    return max(operands, results)
