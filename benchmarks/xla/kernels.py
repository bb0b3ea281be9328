"""The kernels of a compiled GPU program: the bytes and FLOPs of each, and its time at the roofline."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from benchmarks.xla.gpu_program import H100, Target
from benchmarks.xla.hlo import Instruction, Program, dimensions, parse, size_in_bytes
from smollm_jax import errors

NO_KERNEL = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "fusion-done", "async-done", "copy-done"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction that runs on the device `times` per step, with the bytes and FLOPs of each run."""

    name: str
    kind: str  # as in profile_train.py
    origin: str  # JAX's name of the operation
    results: str
    times: int
    bytes: int
    flops: float


def milliseconds(kernels: list[Kernel], target: Target = H100) -> float:
    """The time at the target's roofline: for each kernel the longer of memory traffic and FLOPs."""
    longer = (each.times * max(each.bytes / target.bandwidth, each.flops / target.peak_flops) for each in kernels)
    return 1e3 * sum(longer)


def row(kernels: list[Kernel], target: Target) -> str:
    count = sum(kernel.times for kernel in kernels)
    moved = sum(kernel.times * kernel.bytes for kernel in kernels)
    flops = sum(kernel.times * kernel.flops for kernel in kernels)
    return f"{count:,} | {moved / 1e9:.1f} | {flops / 1e12:.2f} | {milliseconds(kernels, target):.1f}"


def kernels_of(text: str) -> Iterator[Kernel]:
    """The kernels of a compiled GPU program; `times` counts a loop's iterations."""
    program = parse(text)
    return _kernels_in(program, program.entry, 1)


def _kernels_in(program: Program, computation: str, times: int) -> Iterator[Kernel]:
    """The kernels of a computation that runs `times` per step, and of the computations it calls."""
    within = program.computations[computation]
    for name, each in within.items():
        called = each.called
        if each.opcode == "while":
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', each.attributes)
            if not trips:
                raise errors.SmolLMError(f"{name}: the number of the loop's iterations is unknown")
            yield from _kernels_in(program, called["body"][0], times * int(trips[1]))
        elif each.opcode == "conditional":  # the branch that updates weights, or computes a block
            branches = called.get("branch_computations") or called["true_computation"]
            yield from _kernels_in(program, branches[-1], times)
        elif each.opcode not in NO_KERNEL:
            moved, flops = _work(program, each, within)
            results = re.sub(r"\{[^}]*\}", "", each.shape)
            yield Kernel(name, program.kind(each), each.origin, results, times, moved, flops)


def _work(program: Program, each: Instruction, within: dict[str, Instruction]) -> tuple[int, float]:
    """A kernel's bytes read and written, and its FLOPs."""
    if fused := program.computations.get(each.called.get("calls", [""])[0]):
        return bytes_read(fused) + bytes_written(fused), matmul_flops(fused)
    moved = size_in_bytes(each.shape) + sum(size_in_bytes(within[operand].shape) for operand in each.operands)
    return moved, attention_flops(each, within)


def bytes_read(fused: dict[str, Instruction]) -> int:
    """Bytes that a fusion reads: only the slice of a sliced operand, nothing of an operand updated in place."""
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for each in fused.values():
        for operand in each.operands:
            users[operand].append(each)

    def operand_bytes(name: str) -> int:
        whole, total = size_in_bytes(fused[name].shape), 0
        for user in users[name]:
            first = user.operands[0] == name
            if first and user.opcode in ("dynamic-slice", "slice", "gather"):
                total += size_in_bytes(user.shape)
            elif user.opcode == "bitcast":
                total += operand_bytes(user.name)
            elif not (first and user.opcode in ("dynamic-update-slice", "scatter")):
                total += whole
        return min(total, whole)

    return sum(operand_bytes(name) for name, each in fused.items() if each.opcode == "parameter")


def bytes_written(fused: dict[str, Instruction]) -> int:
    """Bytes that a fusion writes: only the update of an update in place; a scatter-add reads and writes its rows."""

    def result_bytes(each: Instruction) -> int:
        operands = [fused[operand] for operand in each.operands]
        if each.opcode == "tuple":
            return sum(map(result_bytes, operands))
        if each.opcode == "bitcast":
            return result_bytes(operands[0])
        if each.opcode == "dynamic-update-slice":
            return size_in_bytes(operands[1].shape)
        if each.opcode == "scatter":
            return 2 * size_in_bytes(operands[-1].shape)
        return 0 if each.opcode == "parameter" else size_in_bytes(each.shape)

    return result_bytes(next(each for each in fused.values() if each.is_root))


def matmul_flops(fused: dict[str, Instruction]) -> float:
    """FLOPs of the matmuls in a fusion."""
    total = 0.0
    for each in fused.values():
        if each.opcode == "dot":
            sizes = dimensions(fused[each.operands[0]].shape)
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)[1]  # pyright: ignore
            total += (
                2.0 * math.prod(dimensions(each.shape)) * math.prod(sizes[int(n)] for n in contracted.split(",") if n)
            )
    return total


def attention_flops(each: Instruction, within: dict[str, Instruction]) -> float:
    """FLOPs of cuDNN's causal attention: two matmuls forward, five backward, each halved by the mask."""
    target = each.custom_call_target
    if not target:
        return 0.0
    if "fmha" not in target:
        raise errors.SmolLMError(f"{target}: the FLOPs of this custom call are unknown")
    B, T, N, H = dimensions(within[each.operands[0]].shape)
    return (5.0 if "Backward" in target else 2.0) * B * N * H * T * (T + 1)
