"""What a trainer prints before its first step: what was decided, and how a resumed run differs from the saved one."""

from pathlib import Path
from typing import Any

import jax

from smollm_jax.config import Recipe
from smollm_jax.model import cost
from smollm_jax.training.flags import TrainingFlags
from smollm_jax.training.setup import Setup
from smollm_jax.training.state import Saved


def announce(run: Path, flags: TrainingFlags, setup: Setup, device: Any, *, retained: bool) -> None:
    """Prints what was decided."""
    start, recipe, compute, cadence = setup.start, setup.start.recipe, setup.compute, setup.cadence
    if device.platform != "gpu":
        print("no GPU found: training on the CPU" + ("" if flags.recipe else ", at a demo size"))
    used = f"{compute.devices} of {jax.device_count()}"
    used += f" as {flags.mesh or f'data={compute.devices}'}" if compute.mesh else ""
    used += f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(f"device      {device.device_kind}, {used}, jax {jax.__version__}")
    print(f"model       {cost.count_parameters(start.config):,} parameters, {start.config}")
    begun = f"weights of {flags.init_from} ({start.bundle.origin})" if start.bundle else None
    begun = begun or f"recipe's init, seed {recipe.seed}"
    saved = start.saved and f"checkpoint of step {start.saved.progress.step}, verified"
    print(f"start       {saved or begun}")
    results = f" with {compute.dtype} results" if compute.operands != compute.dtype else ""
    instead = f" in blocks, for cudnn {setup.without_cudnn}" if setup.without_cudnn else ""
    attention = f"attention {compute.implementation}{instead}"
    print(f"products    {recipe.dtype}{results}, {attention}; weights, moments and loss float32")
    if device.platform == "gpu" and not cost.peak_flops(device.device_kind, recipe.dtype):
        print(cost.no_mfu_note(device.device_kind, recipe.dtype))
    tokens_per_step = f"{recipe.batch_size} x {recipe.sequence_length} = {recipe.tokens_per_step:,} tokens a step"
    if flags.recipe or not saved:
        print(f"recipe      {setup.recipe_name}")
    print(f"steps       {recipe.steps:,} of {tokens_per_step}, {recipe.schedule}, peak {recipe.learning_rate}")
    if start.defaults:
        print(f"            {start.defaults}; --learning-rate and --warmup-steps change that")
    warmup = f"warmup {recipe.warmup_steps} steps, weight decay {recipe.weight_decay}, seed {recipe.seed}"
    print(f"            {warmup}; saved every {cadence.save_every}, validated every {cadence.eval_every} steps")
    keeping = "; what a step frees is kept" if retained else ""
    limit = f"of {setup.limit / 1e9:.1f} GB" if setup.limit else "of what JAX does not say, unchecked"
    remat = f"remat {compute.remat}{'' if flags.remat else ' (chosen; --remat changes that)'}"
    print(f"memory      {setup.planned / 1e9:.1f} GB planned {limit}, on each device, {remat}{keeping}")
    print(f"run         {run}", flush=True)


def print_differences(saved: Saved, recipe: Recipe, environment: dict[str, Any]) -> None:
    """Says what is allowed to differ from the saved run and yet moves its numbers."""
    print(f"resumed from step {saved.progress.step}")
    if recipe.steps != saved.provenance.recipe.steps:
        was = saved.provenance.recipe.steps
        print(f"note: the schedule now ends at step {recipe.steps}, it was made for {was}")
    names = environment.keys() | saved.environment.keys()
    pairs = {name: (saved.environment.get(name), environment.get(name)) for name in sorted(names)}
    if differing := [f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new]:
        print(f"note: goes on within rounding, not bit for bit, for these differ: {', '.join(differing)}")
