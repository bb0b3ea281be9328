"""Compile a training step for many devices, on a machine that does not have them.

    python scripts/check_scaling.py                                            # the default recipe on 64 devices
    python scripts/check_scaling.py --mesh data=64 data=8,fsdp=8 --gradient-accumulation-steps 2
    python scripts/check_scaling.py --recipe smollm2-135m-long --mesh data=512 --batch-size 512

Prints the step's memory per device and its collectives. It runs nothing and allocates no arrays: the devices are XLA's
virtual CPU devices. On GPUs the collectives have the same bytes; cuDNN's attention needs less temporary memory.
"""

import dataclasses
import math
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal

from smollm_jax.commands import command_line
from smollm_jax.config import named_runs
from smollm_jax.config.recipe import Remat, check_batch_divides
from smollm_jax.runtime.program import run_main

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: `benchmarks` is in no wheel


@dataclasses.dataclass(frozen=True)
class Flags:
    mesh: tuple[str, ...] = ("data=64",)
    """Meshes to compile for: data=64, data=8,fsdp=8 ..."""
    recipe: str = "smollm2-135m"
    """Preset and hyperparameters; see train_jax.py."""
    preset: str | None = None
    """Model, instead of the recipe's."""
    batch_size: int | None = None
    """Sequences per step, over all devices."""
    sequence_length: int | None = None
    """Tokens per sequence."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches per step."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Data type of the matmuls."""
    remat: Remat = "dots"
    """What a layer stores for its backward pass."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


RECIPE_FLAGS = ("batch_size", "sequence_length", "gradient_accumulation_steps", "dtype")


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__)
    named = named_runs.by_name(flags.recipe)
    given = {name: getattr(flags, name) for name in RECIPE_FLAGS if getattr(flags, name) is not None}
    recipe = named.resolve(given)
    # JAX reads XLA_FLAGS when it first looks for devices; the last of two settings wins.
    devices = max(math.prod(map(int, re.findall(r"=(\d+)", mesh))) for mesh in flags.mesh)
    virtual = f"--xla_force_host_platform_device_count={devices}"
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {virtual}"}
    for mesh in flags.mesh:
        print(describe(flags.preset or named.preset, recipe, mesh, flags.remat), flush=True)


def describe(name: str, recipe, layout: str, remat: Remat) -> str:
    """The memory per device and the collectives of a step, as text."""
    import collections

    from benchmarks.xla.collectives import collectives
    from smollm_jax.config import preset
    from smollm_jax.parallel import sharding
    from smollm_jax.training import train_step
    from smollm_jax.training.execution import ExecutionConfig

    mesh, accumulation_steps = sharding.make_mesh(layout), recipe.gradient_accumulation_steps
    check_batch_divides(recipe.batch_size, mesh.size, accumulation_steps)
    execution = ExecutionConfig(recipe.dtype, remat=remat, accumulation_steps=accumulation_steps, mesh=mesh)
    compiled: Any = train_step.compile_step(preset(name), recipe, execution)
    memory = compiled.memory_analysis()
    rows = recipe.batch_size // mesh.size
    micro_batches = f"{accumulation_steps} micro-batch{'es' * (accumulation_steps > 1)}"
    shape = f"{rows} of {recipe.batch_size} x {recipe.sequence_length:,} tokens in {micro_batches}"
    lines = [
        f"step            {name} on {layout}: each device {shape}, {recipe.dtype}, remat {remat}",
        f"per device      {memory.argument_size_in_bytes:,} bytes of parameters, optimizer state and tokens",
        f"                {memory.temp_size_in_bytes:,} bytes of temporaries (compiled for a CPU)",
    ]
    total = collections.Counter()
    for kind, size, in_loop in collectives(compiled.as_text()):
        total[kind, in_loop, "count"] += 1
        total[kind, in_loop, "bytes"] += size
    for kind, in_loop in sorted({key[:2] for key in total}):
        count, size = total[kind, in_loop, "count"], total[kind, in_loop, "bytes"]
        lines.append(f"{kind:16}{size:,} bytes in {count}, {'in a loop' if in_loop else 'once per step'}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    run_main(main)
