"""Compile a training step for many devices, on a machine that has none of them.

    python scripts/check_scaling.py                                            # the real recipe on 64 devices
    python scripts/check_scaling.py --mesh data=64 data=8,fsdp=8 --gradient-accumulation-steps 2
    python scripts/check_scaling.py --recipe smollm2-135m-long --mesh data=512 --batch-size 512

Prints what the step holds on each device and what the devices send each other. Nothing is computed, no array is made:
the devices are XLA's virtual CPU ones. On a GPU the collectives' bytes are the same; the temporaries are fewer there
with cuDNN's attention.
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
    """Layouts to compile for, one after another: data=64, data=8,fsdp=8 ..."""
    recipe: str = "smollm2-135m"
    """Preset and numbers; see train_jax.py."""
    preset: str | None = None
    """Another model than the recipe's."""
    batch_size: int | None = None
    """Sequences a step, over all devices."""
    sequence_length: int | None = None
    """Tokens a sequence."""
    gradient_accumulation_steps: int | None = None
    """Parts a batch is computed in, one after another."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the matrix products."""
    remat: Remat = "dots"
    """What a layer keeps for its backward pass."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


RECIPE_FLAGS = ("batch_size", "sequence_length", "gradient_accumulation_steps", "dtype")


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__)
    named = named_runs.by_name(flags.recipe)
    given = {name: getattr(flags, name) for name in RECIPE_FLAGS if getattr(flags, name) is not None}
    recipe = named.resolve(given)
    # Read when JAX first looks for devices; of two settings the last counts.
    devices = max(math.prod(map(int, re.findall(r"=(\d+)", mesh))) for mesh in flags.mesh)
    virtual = f"--xla_force_host_platform_device_count={devices}"
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {virtual}"}
    for mesh in flags.mesh:
        print(describe(flags.preset or named.preset, recipe, mesh, flags.remat), flush=True)


def describe(name: str, recipe, layout: str, remat: Remat) -> str:
    """The memory of each device and the collectives of a step, as text."""
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
        f"a device        {memory.argument_size_in_bytes:,} bytes of parameters, optimizer state and tokens",
        f"                {memory.temp_size_in_bytes:,} bytes of temporaries (compiled for a CPU)",
    ]
    total = collections.Counter()
    for kind, size, in_loop in collectives(compiled.as_text()):
        total[kind, in_loop, "count"] += 1
        total[kind, in_loop, "bytes"] += size
    for kind, in_loop in sorted({key[:2] for key in total}):
        count, size = total[kind, in_loop, "count"], total[kind, in_loop, "bytes"]
        lines.append(f"{kind:16}{size:,} bytes in {count}, {'in a loop' if in_loop else 'once a step'}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    run_main(main)
