"""The kernels of a compiled GPU program: what each reads, writes and computes, and the least time that takes."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from benchmarks.xla.gpu_program import H100, Target
from benchmarks.xla.hlo import Instruction, Program, dimensions, parse, size_in_bytes
from smollm_jax import errors

SILENT = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "fusion-done", "async-done", "copy-done"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction that runs on the device `times` a step, and what it reads and writes, and computes, each time."""

    name: str
    kind: str  # as in profile_train.py
    origin: str  # jax's name for what it computes
    results: str
    times: int
    bytes: int
    flops: float


def milliseconds(kernels: list[Kernel], target: Target = H100) -> float:
    """The longer of moving and computing, kernel by kernel, at the target's ceilings."""
    longer = (each.times * max(each.bytes / target.bandwidth, each.flops / target.products) for each in kernels)
    return 1e3 * sum(longer)


def row(kernels: list[Kernel], target: Target) -> str:
    count = sum(kernel.times for kernel in kernels)
    moved = sum(kernel.times * kernel.bytes for kernel in kernels)
    flops = sum(kernel.times * kernel.flops for kernel in kernels)
    return f"{count:,} | {moved / 1e9:.1f} | {flops / 1e12:.2f} | {milliseconds(kernels, target):.1f}"


def kernels_of(text: str) -> Iterator[Kernel]:
    """The kernels of a compiled GPU program, those in loops as often as these run."""
    program = parse(text)
    return _kernels_in(program, program.entry, 1)


def _kernels_in(program: Program, computation: str, times: int) -> Iterator[Kernel]:
    """Those of a computation that runs `times` a step, and of what it calls."""
    within = program.computations[computation]
    for name, each in within.items():
        called = each.called
        if each.opcode == "while":
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', each.attributes)
            if not trips:
                raise errors.SmolLMError(f"{name}: a loop of unknown length")
            yield from _kernels_in(program, called["body"][0], times * int(trips[1]))
        elif each.opcode == "conditional":  # weights are updated, blocks of documents meet
            branches = called.get("branch_computations") or called["true_computation"]
            yield from _kernels_in(program, branches[-1], times)
        elif each.opcode not in SILENT:
            moved, flops = _work(program, each, within)
            results = re.sub(r"\{[^}]*\}", "", each.shape)
            yield Kernel(name, program.kind(each), each.origin, results, times, moved, flops)


def _work(program: Program, each: Instruction, within: dict[str, Instruction]) -> tuple[int, float]:
    """The bytes that a kernel reads and writes, and its FLOPs."""
    if fused := program.computations.get(each.called.get("calls", [""])[0]):
        return read(fused) + written(fused), products(fused)
    moved = size_in_bytes(each.shape) + sum(size_in_bytes(within[operand].shape) for operand in each.operands)
    return moved, attention(each, within)


def read(fused: dict[str, Instruction]) -> int:
    """Bytes a fusion reads of its operands: slices of what it slices, nothing of what it writes into."""
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for each in fused.values():
        for operand in each.operands:
            users[operand].append(each)

    def bytes_read(name: str) -> int:
        whole, total = size_in_bytes(fused[name].shape), 0
        for user in users[name]:
            first = user.operands[0] == name
            if first and user.opcode in ("dynamic-slice", "slice", "gather"):
                total += size_in_bytes(user.shape)
            elif user.opcode == "bitcast":
                total += bytes_read(user.name)
            elif not (first and user.opcode in ("dynamic-update-slice", "scatter")):
                total += whole
        return min(total, whole)

    return sum(bytes_read(name) for name, each in fused.items() if each.opcode == "parameter")


def written(fused: dict[str, Instruction]) -> int:
    """Bytes a fusion writes: of an update in place the update, of a sum into rows the rows, read and written."""

    def bytes_written(each: Instruction) -> int:
        below = [fused[operand] for operand in each.operands]
        if each.opcode == "tuple":
            return sum(map(bytes_written, below))
        if each.opcode == "bitcast":
            return bytes_written(below[0])
        if each.opcode == "dynamic-update-slice":
            return size_in_bytes(below[1].shape)
        if each.opcode == "scatter":
            return 2 * size_in_bytes(below[-1].shape)
        return 0 if each.opcode == "parameter" else size_in_bytes(each.shape)

    return bytes_written(next(each for each in fused.values() if each.is_root))


def products(fused: dict[str, Instruction]) -> float:
    """FLOPs of the matrix products in a fusion."""
    total = 0.0
    for each in fused.values():
        if each.opcode == "dot":
            sizes = dimensions(fused[each.operands[0]].shape)
            summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)[1]  # pyright: ignore
            total += 2.0 * math.prod(dimensions(each.shape)) * math.prod(sizes[int(n)] for n in summed.split(",") if n)
    return total


def attention(each: Instruction, within: dict[str, Instruction]) -> float:
    """FLOPs of a call of cuDNN's causal attention: two products forward, five backward, half of each not needed."""
    target = each.custom_call_target
    if not target:
        return 0.0
    if "fmha" not in target:
        raise errors.SmolLMError(f"{target}: a kernel whose work is not known here")
    B, T, N, H = dimensions(within[each.operands[0]].shape)
    return (5.0 if "Backward" in target else 2.0) * B * N * H * T * (T + 1)
