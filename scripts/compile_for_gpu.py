"""What XLA makes of a training step for a GPU that is not here: its memory, its kernels, and what they move.

    pip install -e ".[cuda13]"                                       # or make gpu-program, which does
    python scripts/compile_for_gpu.py --batch-size 16
    python scripts/compile_for_gpu.py --batch-size 4 --sequence-length 8192 --remat none --kernels 40
    python scripts/compile_for_gpu.py --target rtx4090 --batch-size 8 --remat swiglu

Compiles ahead of time, with XLA's own GPU compiler and without a driver. Memory, kernels and bytes are facts of that
program. "At the ceilings" is arithmetic from them: the longer of bytes at 3.0 TB/s and FLOPs at 790 TFLOP/s, what large
copies and products reach on an H100; for another --target at the figures of its data sheet. A kernel is taken to read
each operand and write each result once: of a slice the slice, of what it updates in place the update. Which GEMM
kernels will run is decided by a GPU's clock alone (XLA tunes them there), so their bytes are not what tiles make of
them.
"""

import collections
import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from profile_train import instructions

from smollm_jax import command_line, cost, errors, install

# What XLA wants to know of a GPU. `%` is what differs from card to card.
CARD = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation"
  device_address_bits: 64 driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0" name: "%(name)s" platform_version: "Compute Capability %(capability)s" %(numbers)s
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "%(name)s"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for, and the bytes/s and FLOP/s it is taken to reach."""

    name: str  # as its driver says it
    capability: str
    numbers: str
    bandwidth: float
    products: float
    source: str  # of these two

    @property
    def config(self) -> str:
        """As XLA's `target_config` takes it."""
        return CARD % {"name": self.name, "capability": self.capability, "numbers": " ".join(self.numbers.split())}


def by_data_sheet(name: str, capability: str, numbers: str) -> Target:
    bandwidth, products = cost.bandwidth(name), cost.peak_flops(name)
    assert bandwidth
    assert products
    return Target(name, capability, numbers, bandwidth, products, "by its data sheet")


# The numbers of h100 and a100: openxla/xla, xla/backends/gpu/target_config/specs/h100_sxm.txtpb, a100_sxm_80.txtpb.
# Of rtx4090, which has none there: NVIDIA's Ada whitepaper, appendix A, and the CUDA programming guide's table of
# compute capability 8.9. An L40S is of that capability, too.
TARGETS = {
    "h100": Target(
        "NVIDIA H100 80GB HBM3",
        "9.0a",
        """cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES } core_count: 132
        fpus_per_core: 128 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
        threads_per_core_limit: 2048 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
        device_memory_size: 84942979072""",
        3.0e12,
        790e12,
        "which large copies and products reach",  # docs/performance.md
    ),
    "a100": by_data_sheet(
        "NVIDIA A100-SXM4-80GB",
        "8.0",
        """cuda_compute_capability { major: 8 } core_count: 108 fpus_per_core: 64
        shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 threads_per_core_limit: 2048
        memory_bandwidth: 2039040000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41 device_memory_size: 85100068864""",
    ),
    "rtx4090": by_data_sheet(
        "NVIDIA GeForce RTX 4090",
        "8.9",
        """cuda_compute_capability { major: 8 minor: 9 } core_count: 128 fpus_per_core: 128
        shared_memory_per_core: 102400 shared_memory_per_block_optin: 101376 threads_per_core_limit: 1536
        memory_bandwidth: 1008000000000 l2_cache_size: 75497472 clock_rate_ghz: 2.52 device_memory_size: 25769803776""",
    ),
}
H100 = TARGETS["h100"]
WIDTHS = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1, "s8": 1}
SILENT = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "fusion-done", "async-done", "copy-done"}


@dataclasses.dataclass(frozen=True)
class Flags:
    preset: str = "smollm2-135m"
    """Model."""
    batch_size: int = 16
    """Sequences a step."""
    sequence_length: int = 2048
    """Tokens a sequence."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the products."""
    remat: Literal["none", "swiglu", "dots", "full"] | None = None
    """As in train_jax.py; default: the three it chooses from, one after another."""
    target: Literal["h100", "a100", "rtx4090"] = "h100"
    """GPU to compile for: of compute capability 9.0, 8.0 or 8.9."""
    unroll: int | None = None
    """Layers laid out per step of the layer scan; default: as in train_jax.py."""
    mask_documents: bool = False
    """Documents that do not see each other, as in train_jax.py."""
    kernels: int = 20
    """How many kinds of kernels to list."""
    hlo: Path | None = None
    """File for the compiled program's text."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__)
    for name in ("batch_size", "sequence_length", "unroll", "kernels"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise errors.UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for remat in ("none", "swiglu", "dots") if flags.remat is None else (flags.remat,):
        show(flags, remat)


def show(flags: Flags, remat: Any) -> None:
    """Compiles a step and prints what it is made of."""
    from smollm_jax import memory, train_step
    from smollm_jax.attention import beyond_cudnn
    from smollm_jax.config import preset
    from smollm_jax.recipe import Recipe

    config = preset(flags.preset)
    recipe = Recipe(
        1000, flags.batch_size, flags.sequence_length, learning_rate=1e-3, warmup_steps=0, dtype=flags.dtype
    )
    beyond = flags.dtype != "bfloat16" or beyond_cudnn(flags.sequence_length, config.head_dim, flags.mask_documents)
    attention: Any = "xla" if beyond else "cudnn"
    unroll = train_step.layers_at_once(config, attention) if flags.unroll is None else flags.unroll
    document_end = config.eos_token_ids[0] if flags.mask_documents else None
    compute = train_step.Compute(flags.dtype, attention, remat, unroll, document_end=document_end)
    print(f"step        {recipe.batch_size} x {recipe.sequence_length} tokens of {flags.preset}, {compute}", flush=True)
    began = time.perf_counter()
    target = TARGETS[flags.target]
    step = compile_step(config, recipe, compute, target)
    print(f"compiled    in {time.perf_counter() - began:.0f} s, for {target.name}")
    reached = f"{target.bandwidth / 1e12:.2f} TB/s and {target.products / 1e12:.0f} TFLOP/s"
    print(f"ceilings    {reached}, {target.source}")
    plan = memory.plan(config, recipe, compute, "gpu")
    need, planned = memory.needed(step), dataclasses.replace(plan, workspace=0).total
    print(f"memory      {need / 1e9:.2f} GB; the plan says {planned / 1e9:.2f}, {planned / need - 1:+.1%}")
    print(f"            and leaves {(plan.total - planned) / 1e9:.2f} for cuDNN's workspace, of which only a GPU knows")
    text = step.as_text()
    if flags.hlo:
        flags.hlo.write_text(text, encoding="utf-8")
    kernels = [*kernels_of(text)]
    print("\n| kind of work | kernels a step | GB moved | TFLOP | ms at the ceilings |\n|---|---:|---:|---:|---:|")
    kinds = sorted({kernel.kind for kernel in kernels})
    for kind in [*kinds, "**step**"]:
        of_kind = [kernel for kernel in kernels if kind in (kernel.kind, "**step**")]
        print(f"| {kind} | {row(of_kind, target)} |")
    print(f"| of it no product, no attention | {row([kernel for kernel in kernels if not kernel.flops], target)} |")
    groups: dict[tuple[str, str, str], list[Kernel]] = collections.defaultdict(list)
    for kernel in kernels:
        groups[kernel.kind, kernel.results, kernel.origin.rpartition("/")[2]].append(kernel)
    print("\n| kind | result | from | kernels a step | GB moved | TFLOP | ms at the ceilings |")
    print("|---|---|---|---:|---:|---:|---:|")
    longest = sorted(groups.items(), key=lambda group: -milliseconds(group[1], target))
    for (kind, results, origin), same in longest[: flags.kernels]:
        print(f"| {kind} | {results[:60]} | {origin} | {row(same, target)} |")


def compile_step(config: Any, recipe: Any, compute: Any, target: Target = H100) -> Any:
    """`train_step.compile_step` for a GPU; raises `SmolLMError` where JAX's CUDA plugin is not installed."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # it asks libraries that ask the driver
    import jax
    import jax.numpy as jnp
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.experimental import topologies

    from smollm_jax import optimizer, train_step

    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=target.config, topology="1x1x1")
    except Exception as error:
        raise errors.SmolLMError(f"no CUDA plugin of JAX's here, {install.command('cuda13')}: {error}") from error
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    state = train_step.abstract_state(config, recipe)
    tokens = jax.ShapeDtypeStruct((recipe.batch_size, recipe.sequence_length + 1), jnp.int32)
    there = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)  # noqa: E731
    state, tokens = jax.tree.map(there, (state, tokens))
    with contextlib.ExitStack() as answers:  # what a GPU and its libraries would say, where these are asked
        answers.enter_context(mock.patch.object(jax, "default_backend", return_value="gpu"))
        answers.enter_context(mock.patch.object(cudnn, "check_cudnn_version", return_value=91200))
        answers.enter_context(mock.patch.object(cudnn, "check_compute_capability", return_value=True))
        answers.enter_context(mock.patch.object(cudnn, "is_cuda_compute_capability_equal", return_value=False))
        traced = train_step.train_step.trace(state, tokens, tx=optimizer.adamw(recipe), compute=compute)
        return traced.lower(lowering_platforms=("cuda",)).compile()


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


if __name__ == "__main__":
    errors.run(main)
