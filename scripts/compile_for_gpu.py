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
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: `benchmarks` is in no wheel

from benchmarks.xla.gpu_program import TARGETS, Target, compile_step
from benchmarks.xla.kernels import Kernel, kernels_of, milliseconds, row
from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.config.recipe import Remat
from smollm_jax.runtime.program import run_main


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
    remat: Remat | None = None
    """As in train_jax.py; default: the three it chooses from, one after another."""
    target: Literal["h100", "a100", "rtx4090"] = "h100"
    """GPU to compile for: of compute capability 9.0, 8.0 or 8.9."""
    unroll: int | None = None
    """Layers unrolled per step of the layer scan; default: as in train_jax.py."""
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
    from smollm_jax.config import Recipe, preset
    from smollm_jax.training import memory
    from smollm_jax.training.execution import ExecutionConfig, default_unroll, fastest_attention

    config = preset(flags.preset)
    recipe = Recipe(
        1000, flags.batch_size, flags.sequence_length, learning_rate=1e-3, warmup_steps=0, dtype=flags.dtype
    )
    target, length = TARGETS[flags.target], flags.sequence_length
    attention, _ = fastest_attention(target, flags.dtype, length, config.head_dim, flags.mask_documents)
    unroll = default_unroll(config, attention) if flags.unroll is None else flags.unroll
    separator_id = config.eos_token_ids[0] if flags.mask_documents else None
    execution = ExecutionConfig(flags.dtype, attention, remat, unroll, separator_id=separator_id)
    print(
        f"step        {recipe.batch_size} x {recipe.sequence_length} tokens of {flags.preset}, {execution}", flush=True
    )
    began = time.perf_counter()
    step = compile_step(config, recipe, execution, target)
    print(f"compiled    in {time.perf_counter() - began:.0f} s, for {target.name}")
    reached = f"{target.bandwidth / 1e12:.2f} TB/s and {target.products / 1e12:.0f} TFLOP/s"
    print(f"ceilings    {reached}, {target.source}")
    plan = memory.estimate(config, recipe, execution, "gpu")
    need, planned = memory.compiled_bytes(step), dataclasses.replace(plan, workspace=0).total
    print(f"memory      {need / 1e9:.2f} GB; the plan says {planned / 1e9:.2f}, {planned / need - 1:+.1%}")
    print(f"            and leaves {(plan.total - planned) / 1e9:.2f} for cuDNN's workspace, of which only a GPU knows")
    text = step.as_text()
    if flags.hlo:
        flags.hlo.write_text(text, encoding="utf-8")
    print_tables([*kernels_of(text)], target, flags.kernels)


def print_tables(kernels: list[Kernel], target: Target, most: int) -> None:
    """What a step's kernels move and compute, by kind of work, and of the kinds of kernels that take longest."""
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
    for (kind, results, origin), same in longest[:most]:
        print(f"| {kind} | {results[:60]} | {origin} | {row(same, target)} |")


if __name__ == "__main__":
    run_main(main)
