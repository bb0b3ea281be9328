"""What a trainer prints before its first step: its settings, and how a resumed run differs from the saved one."""

from pathlib import Path
from typing import Any

import jax

from smollm_jax.config import Recipe
from smollm_jax.model import cost
from smollm_jax.training.flags import TrainingFlags
from smollm_jax.training.setup import Setup
from smollm_jax.training.state import RestoredRun


def announce(run: Path, flags: TrainingFlags, setup: Setup, device: Any, *, retained: bool) -> None:
    """Prints the settings of a run; `retained`: glibc reuses freed memory."""
    start, recipe, execution, intervals = setup.start, setup.start.recipe, setup.execution, setup.intervals
    if device.platform != "gpu":
        print("no GPU found: training on the CPU" + ("" if flags.recipe else " with the demo recipe"))
    devices = f"{execution.devices} of {jax.device_count()}"
    devices += f" as {flags.mesh or f'data={execution.devices}'}" if execution.mesh else ""
    devices += f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(f"device      {device.device_kind}, {devices}, jax {jax.__version__}")
    print(f"model       {cost.count_parameters(start.config):,} parameters, {start.config}")
    if start.restored:
        print(f"start       checkpoint of step {start.restored.progress.step}, verified")
    elif start.bundle:
        print(f"start       weights of {flags.init_from} ({start.bundle.origin})")
    else:
        print(f"start       random initialization, seed {recipe.seed}")
    results = f" with {execution.dtype} results" if execution.operands != execution.dtype else ""
    reason = f" (cudnn {setup.why_not_cudnn})" if setup.why_not_cudnn else ""
    attention = f"attention {execution.attention}{reason}"
    print(f"precision   {recipe.dtype} matmuls{results}, {attention}; weights, optimizer state and loss in float32")
    if device.platform == "gpu" and not cost.peak_flops(device.device_kind, recipe.dtype):
        print(cost.no_mfu_note(device.device_kind, recipe.dtype))
    if flags.recipe or not start.restored:
        print(f"recipe      {setup.recipe_name}")
    shape = f"{recipe.batch_size} x {recipe.sequence_length} = {recipe.tokens_per_step:,} tokens"
    print(f"steps       {recipe.steps:,} of {shape} each, {recipe.schedule} schedule, peak {recipe.learning_rate}")
    if start.defaults:
        print(f"            {start.defaults}; --learning-rate and --warmup-steps change that")
    print(f"            warm-up {recipe.warmup_steps} steps, weight decay {recipe.weight_decay}, seed {recipe.seed}")
    saving, validation = (
        f"every {steps} steps" if steps else "after the last step"
        for steps in (intervals.save_every, intervals.eval_every)
    )
    print(f"            checkpoint {saving}, validation {validation}")
    planned = f"{setup.planned / 1e9:.1f} GB"
    checked = f"{planned} of {setup.limit / 1e9:.1f} GB on each device (estimated)"
    unchecked = f"{planned} on each device (estimated; not checked, as JAX reports no limit)"
    remat = f"remat {execution.remat}{'' if flags.remat else ' (chosen; --remat changes that)'}"
    reuse = "; freed memory is reused" if retained else ""
    print(f"memory      {checked if setup.limit else unchecked}, {remat}{reuse}")
    print(f"run         {run}", flush=True)


def print_resume_differences(restored: RestoredRun, recipe: Recipe, environment: dict[str, Any]) -> None:
    """Prints the differences from the saved run that are allowed but change its numbers."""
    print(f"resumed from step {restored.progress.step}")
    if recipe.steps != restored.provenance.recipe.steps:
        saved_steps = restored.provenance.recipe.steps
        print(f"note: the schedule now ends at step {recipe.steps}; in the saved run it ended at step {saved_steps}")
    names = environment.keys() | restored.environment.keys()
    pairs = {name: (restored.environment.get(name), environment.get(name)) for name in sorted(names)}
    if changes := [f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new]:
        print(f"note: equal to the saved run within rounding only, not bit for bit, because of {', '.join(changes)}")
