"""What devices send each other in a compiled program, read off its HLO text. Framework-free.

`scripts/check_scaling.py` prints it for a training step.
"""

import collections
import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$", re.MULTILINE)
_CALLED = re.compile(
    r"\b(body|condition|to_apply|calls|\w+_computations?)=(?:%?([\w.-]+)|\{([^}]*)\})"  # one, or {several}
)
_SHAPE = re.compile(r"\b(?:(pred)|(token)|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective instruction; `bytes` are those of the whole arrays: gathered, or before they are scattered."""

    kind: str
    bytes: int
    in_loop: bool  # in a loop's body or condition, or in what these call


def collectives(text: str) -> list[Collective]:
    """The collectives of `compiled.as_text()`, in its order; a start and its done are one.

    Raises `ValueError` when an operand is nowhere defined: this is not the text of a whole program then.
    """
    headers = [match for match in _COMPUTATION.finditer(text) if match[1] != "HloModule"]
    ends = [match.start() for match in headers[1:]] + [len(text)]
    bodies = {match[1]: text[match.end() : end] for match, end in zip(headers, ends, strict=True)}
    calls, looped = collections.defaultdict(set), set()
    for name, body in bodies.items():
        for kind, one, several in _CALLED.findall(body):
            called = {one} if one else set(re.findall(r"[\w.-]+", several))
            calls[name] |= called
            if kind in ("body", "condition"):
                looped |= called
    while more := {called for name in looped for called in calls[name]} - looped:
        looped |= more
    return [
        found._replace(in_loop=name in looped) for name, body in bodies.items() for found in _in_computation(name, body)
    ]


def _in_computation(name: str, body: str) -> list[Collective]:
    found, types = [], {}
    for instruction, result, opcode, rest in _INSTRUCTION.findall(body):
        types[instruction] = result
        kind = opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        operands = re.findall(r"%([\w.-]+)", rest[: rest.index(")")])
        if missing := [operand for operand in operands if operand not in types]:
            raise ValueError(f"{name}: {instruction} takes {missing[0]}, which is not defined before it")
        given, total = sum(_bytes(types[operand]) for operand in operands), _bytes(result)
        # A start may return what it was given beside what it will give.
        got = total - given if kind != opcode and total > given else total
        found.append(Collective(kind, max(given, got), False))
    return found


def _bytes(type_text: str) -> int:
    total = 0
    for pred, token, bits, sizes in _SHAPE.findall(type_text):
        width = 8 if pred else 0 if token else int(bits)
        total += math.prod(int(size) for size in sizes.split(",") if size) * width // 8
    return total
