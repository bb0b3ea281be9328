"""Compile a training step for a GPU without having one: memory, kernels, and the bytes that they move.

    pip install -e ".[cuda13]"                                       # or make gpu-program, which does
    python scripts/compile_for_gpu.py --batch-size 16
    python scripts/compile_for_gpu.py --batch-size 4 --sequence-length 8192 --remat none --top-kernels 40
    python scripts/compile_for_gpu.py --target rtx4090 --batch-size 8 --remat swiglu

Compiles ahead of time, with XLA's own GPU compiler and without a driver. Memory, kernels and bytes are those of the
compiled program. "ms at the roofline" is an estimate from them: the longer of bytes at 3.0 TB/s and FLOPs at 790
TFLOP/s, which large copies and matmuls reach on an H100; for another --target the figures of its data sheet. It assumes
that a kernel reads each operand and writes each result once, and of a slice or an update in place only that part. XLA
chooses GEMM kernels by timing them on the GPU, so the extra traffic of their tiles is not included.
"""

import collections
import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

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
    """Sequences per step."""
    sequence_length: int = 2048
    """Tokens per sequence."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the matmuls."""
    remat: Remat | None = None
    """As in train_jax.py; default: all three that it chooses from."""
    target: Literal["h100", "a100", "rtx4090"] = "h100"
    """GPU to compile for; compute capabilities 9.0, 8.0 and 8.9."""
    unroll: int | None = None
    """Layers unrolled per step of the layer scan; default: as in train_jax.py."""
    mask_documents: bool = False
    """Mask attention across documents, as in train_jax.py."""
    top_kernels: Annotated[int, tyro.conf.arg(aliases=["--kernels"])] = 20
    """Number of kinds of kernels to list, the slowest first."""
    hlo: Path | None = None
    """File to write the compiled program's text to."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__)
    for name in ("batch_size", "sequence_length", "unroll", "top_kernels"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise errors.UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for remat in ("none", "swiglu", "dots") if flags.remat is None else (flags.remat,):
        show(flags, remat)


def show(flags: Flags, remat: Any) -> None:
    """Compiles a step and prints its memory and kernels."""
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
    peak = f"{target.bandwidth / 1e12:.2f} TB/s and {target.peak_flops / 1e12:.0f} TFLOP/s"
    print(f"roofline    {peak}, {target.source}")
    plan = memory.estimate(config, recipe, execution, "gpu")
    need, planned = memory.compiled_bytes(step), dataclasses.replace(plan, workspace=0).total
    print(f"memory      {need / 1e9:.2f} GB; estimated {planned / 1e9:.2f} GB, {planned / need - 1:+.1%}")
    print(f"            plus an estimated {(plan.total - planned) / 1e9:.2f} GB for cuDNN's workspace")
    text = step.as_text()
    if flags.hlo:
        flags.hlo.write_text(text, encoding="utf-8")
    print_tables([*kernels_of(text)], target, flags.top_kernels)


def print_tables(kernels: list[Kernel], target: Target, top: int) -> None:
    """Prints kernels, bytes and FLOPs of a step by kind of work, and those of the slowest kinds of kernels."""
    print("\n| kind of work | kernels per step | GB moved | TFLOP | ms at the roofline |\n|---|---:|---:|---:|---:|")
    kinds = sorted({kernel.kind for kernel in kernels})
    for kind in [*kinds, "**step**"]:
        of_kind = [kernel for kernel in kernels if kind in (kernel.kind, "**step**")]
        print(f"| {kind} | {row(of_kind, target)} |")
    print(f"| of it neither matmul nor attention | {row([kernel for kernel in kernels if not kernel.flops], target)} |")
    groups: dict[tuple[str, str, str], list[Kernel]] = collections.defaultdict(list)
    for kernel in kernels:
        groups[kernel.kind, kernel.results, kernel.origin.rpartition("/")[2]].append(kernel)
    print("\n| kind | result | from | kernels per step | GB moved | TFLOP | ms at the roofline |")
    print("|---|---|---|---:|---:|---:|---:|")
    longest = sorted(groups.items(), key=lambda group: -milliseconds(group[1], target))
    for (kind, results, origin), same in longest[:top]:
        print(f"| {kind} | {results[:60]} | {origin} | {row(same, target)} |")


if __name__ == "__main__":
    run_main(main)
