"""AdamW with a clipped gradient and the recipe's learning rate, from optax."""

import functools

import jax
import jax.numpy as jnp
import optax

from smollm_jax.config import Recipe


def learning_rate(recipe: Recipe) -> optax.Schedule:
    """Learning rate of step n (0 = the first): linear from 0 to the peak, then flat and linear to 0 (WSD), or cosine.

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
    # A float count, float64 where enabled: from an int32 count optax gives float32 whatever the run's precision.
    return lambda count: schedule(jnp.asarray(count, float))


def clip_by_global_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """optax's within three roundings; it takes as `norm` what is known already, and reads the gradients once less.

    A product with one number, where optax divides: XLA:CPU would keep all quotients, as large as the gradients.
    """

    def update(updates, state, params=None, *, norm=None, **_):
        norm = optax.tree.norm(updates) if norm is None else norm
        scale = jnp.where(norm < limit, 1, limit / norm)
        return jax.tree.map(lambda update: update * scale, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


@functools.cache  # the same recipe, the same object: jit compiles a step once for it
def adamw(recipe: Recipe) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm (`norm=`, where known), then AdamW with decoupled decay on every parameter.

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
        ),
    )
