"""One optimizer step, jitted, state donated: gradients on every device, summed, then AdamW's update."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from smollm_jax.config import Config, Recipe
from smollm_jax.parallel import sharding
from smollm_jax.training import optimizer
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.loss import NEXT_TOKEN, Objective, data_parallel, mean_gradients
from smollm_jax.training.state import TrainState, abstract_state

Step = Callable[..., tuple[TrainState, dict[str, Any]]]  # of a state, a batch and what is frozen


@functools.partial(jax.jit, static_argnames=("tx", "execution", "objective"), donate_argnames="state")
def train_step(
    state: TrainState,
    batch: Any,
    frozen: Any = None,
    *,
    tx: optax.GradientTransformationExtraArgs,
    execution: ExecutionConfig,
    objective: Objective = NEXT_TOKEN,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """The state after one optimizer step, with loss, gradient norm (before clipping) and the objective's other means as
    device scalars.

    If loss or norm is not finite, the state is returned unchanged, bit for bit, including its step count.
    """
    gradients: Any
    out_specs = ((sharding.REPLICATED, sharding.REPLICATED), sharding.fsdp_specs(state.model, execution.mesh))
    (loss, metrics), gradients = data_parallel(
        mean_gradients, state.model, batch, execution, objective, frozen, out_specs=out_specs
    )
    with jax.named_scope("optimizer"):  # `scripts/profile_train.py` groups by this name
        norm = optax.tree.norm(gradients)

    @jax.named_scope("optimizer")
    def update(state: TrainState) -> TrainState:
        parameters: Any = state.model  # Any: optax's types know arrays and dicts only, but any pytree works
        updates, opt_state = tx.update(gradients, state.opt_state, parameters, norm=norm)
        model: Any = optax.apply_updates(parameters, updates)
        return TrainState(model, opt_state)

    state = update_where(jnp.isfinite(loss) & jnp.isfinite(norm), update, state)
    if execution.mesh is not None:  # keep the sharding, so that donated buffers are reused
        state = jax.lax.with_sharding_constraint(state, sharding.shardings(state, execution.mesh))
    return state, {"loss": loss, "gradient_norm": norm, **metrics}


def update_where(finite: Bool[Array, ""], update: Callable[[TrainState], TrainState], state: TrainState) -> TrainState:
    """`update(state)` if `finite`, else `state`, bit for bit.

    On a CPU a branch is free, while an elementwise select costs 11 % of a step. On a GPU the select is fused into the
    write of the new state; a branch would split the step, and its result may be copied. Not `optax.apply_if_finite`,
    which applies the NaN after its limit.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.cond(finite, update, lambda state: state, state)
    with jax.named_scope("optimizer"):
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), update(state), state)


def compile_step(
    config: Config,
    recipe: Recipe,
    execution: ExecutionConfig,
    *,
    objective: Objective = NEXT_TOKEN,
    batch: Any = None,
    state: Any = None,
    frozen: Any = None,
) -> Step:
    """A run's `train_step`, compiled ahead of time from shapes alone, before any data or weights are loaded.

    Without the shapes of a `batch` and a `state` they are pre-training's; `frozen` is as in `train_step`.
    """
    by_rows = jax.sharding.NamedSharding(execution.mesh, sharding.BATCH_SPEC) if execution.mesh is not None else None
    if batch is None:
        batch = jax.ShapeDtypeStruct((recipe.batch_size, recipe.sequence_length + 1), jnp.int32)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_rows), batch)
    state = sharding.abstract(abstract_state(config, recipe) if state is None else state, execution.mesh)
    frozen = {} if frozen is None else {"frozen": sharding.abstract(frozen, execution.mesh)}
    options = {"tx": optimizer.adamw(recipe), "execution": execution, "objective": objective}
    return train_step.lower(state, batch, **frozen, **options).compile()
