"""AdamW with gradient clipping and the recipe's learning rate schedule, built from optax."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from smollm_jax.config import Recipe


def learning_rate(recipe: Recipe) -> optax.Schedule:
    """Learning rate of step n (first: 0): linear warm-up to the peak, then constant and linear to 0 (WSD), or cosine.

    Source: Hu et al. 2024 (MiniCPM), section 4, for WSD; its numbers here are SmolLM2's.
    """
    peak, warmup = recipe.learning_rate, recipe.warmup_steps
    if recipe.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, recipe.steps)
    else:
        schedule = optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, 0.0, recipe.steps - recipe.decay_start),
            ],
            boundaries=[warmup, recipe.decay_start],
        )
    # Cast the count to float (float64 if enabled): from an int32 count optax always computes in float32.
    return lambda count: schedule(jnp.asarray(count, float))


def clip_by_global_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` within three roundings, for a `norm` that may be given: one pass over gradients less.

    Multiplies by one scale where optax divides: XLA:CPU would materialize the quotients, as large as the gradients.
    """

    def update(updates, state, params=None, *, norm=None, **_):
        norm = optax.tree.norm(updates) if norm is None else norm
        scale = jnp.where(norm < limit, 1, limit / norm)
        return jax.tree.map(lambda update: update * scale, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def without_norms(parameters: Any) -> Any:
    """True for every parameter but the norms' scales, recognized by name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), parameters)


@functools.cache  # one object per recipe, so that jit compiles a step once for it
def adamw(recipe: Recipe) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm (`norm=` if known), then AdamW with decoupled weight decay on every parameter, or
    on all but the norms' scales.

    Source: Loshchilov and Hutter 2019.
    """
    return optax.chain(
        clip_by_global_norm(recipe.clip),
        optax.adamw(
            learning_rate(recipe),
            b1=recipe.beta1,
            b2=recipe.beta2,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            mask=None if recipe.decays_norms or not recipe.weight_decay else without_norms,
        ),
    )
