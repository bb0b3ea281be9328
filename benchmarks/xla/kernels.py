"""The kernels of a compiled GPU program: what each reads, writes and computes, and the least time that takes."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from benchmarks.xla.gpu_program import H100, Target
from benchmarks.xla.hlo import instructions
from smollm_jax import errors

WIDTHS = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1, "s8": 1}
SILENT = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "fusion-done", "async-done", "copy-done"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    shape: str
    opcode: str
    operands: list[str]
    attributes: str
    root: bool


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
    computations, entry = parse(text)
    kinds = instructions(text)

    def walk(computation: str, times: int) -> Iterator[Kernel]:
        within = computations[computation]
        for name, each in within.items():
            if each.opcode in SILENT:
                continue
            called = dict(re.findall(r"(\w+)=%([\w.-]+)", each.attributes))
            if each.opcode == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', each.attributes)
                if not trips:
                    raise errors.SmolLMError(f"{name}: a loop of unknown length")
                yield from walk(called["body"], times * int(trips[1]))
                continue
            if each.opcode == "conditional":  # weights are updated, blocks of documents meet
                branches = re.search(r"branch_computations=\{([^}]*)\}", each.attributes)
                chosen = branches[1].split(", ")[-1].lstrip("%") if branches else called["true_computation"]
                yield from walk(chosen, times)
                continue
            fused = computations.get(called.get("calls", ""))
            if fused:
                moved, flops = read(fused) + written(fused), products(fused)
            else:
                moved = size(each.shape) + sum(size(within[operand].shape) for operand in each.operands)
                flops = attention(each, within)
            results = re.sub(r"\{[^}]*\}", "", each.shape)
            yield Kernel(name, kinds[name].kind, kinds[name].origin, results, times, moved, flops)

    return walk(entry, 1)


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The computations of a program's text, each its instructions by name, and which of them is the whole."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if match := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif match := re.match(r" +(ROOT )?%([\w.-]+) = ", line):
            shape, rest = balanced(line[match.end() :])
            opcode, rest = re.match(r"\s*([\w-]+)(.*)", rest).groups()  # pyright: ignore
            operands, attributes = balanced(rest)
            names = re.findall(r"%([\w.-]+)", operands)
            current[match[2]] = Instruction(shape, opcode, names, attributes, bool(match[1]))
    return computations, entry


def balanced(text: str) -> tuple[str, str]:
    """A word or a pair of parentheses with all that is in it, and what follows."""
    if not text.startswith("("):
        word, _, rest = text.partition(" ")
        return word, rest
    depth = 0
    for end, letter in enumerate(text, 1):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:end], text[end:]
    raise errors.SmolLMError(f"a parenthesis without its pair: {text[:80]}")


def dimensions(shape: str) -> list[int]:
    return [int(size) for size in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if size]  # pyright: ignore


def size(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple."""
    arrays = re.findall(r"(\w+)(\[[\d,]*\])", shape)
    return sum(WIDTHS[dtype] * math.prod(dimensions(sizes)) for dtype, sizes in arrays)


def read(fused: dict[str, Instruction]) -> int:
    """Bytes a fusion reads of its operands: slices of what it slices, nothing of what it writes into."""
    users: dict[str, list[tuple[str, Instruction]]] = collections.defaultdict(list)
    for name, each in fused.items():
        for operand in each.operands:
            users[operand].append((name, each))

    def of(name: str) -> int:
        whole, total = size(fused[name].shape), 0
        for user, each in users[name]:
            first = each.operands[0] == name
            if first and each.opcode in ("dynamic-slice", "slice", "gather"):
                total += size(each.shape)
            elif each.opcode == "bitcast":
                total += of(user)
            elif not (first and each.opcode in ("dynamic-update-slice", "scatter")):
                total += whole
        return min(total, whole)

    return sum(of(name) for name, each in fused.items() if each.opcode == "parameter")


def written(fused: dict[str, Instruction]) -> int:
    """Bytes a fusion writes: of an update in place the update, of a sum into rows the rows, read and written."""

    def of(each: Instruction) -> int:
        below = [fused[operand] for operand in each.operands]
        if each.opcode == "tuple":
            return sum(map(of, below))
        if each.opcode == "bitcast":
            return of(below[0])
        if each.opcode == "dynamic-update-slice":
            return size(below[1].shape)
        if each.opcode == "scatter":
            return 2 * size(below[-1].shape)
        return 0 if each.opcode == "parameter" else size(each.shape)

    return of(next(each for each in fused.values() if each.root))


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
    target = re.search(r'custom_call_target="([^"]*)"', each.attributes)
    if not target:
        return 0.0
    if "fmha" not in target[1]:
        raise errors.SmolLMError(f"{target[1]}: a kernel whose work is not known here")
    B, T, N, H = dimensions(within[each.operands[0]].shape)
    return (5.0 if "Backward" in target[1] else 2.0) * B * N * H * T * (T + 1)
