"""The loss on held-out batches."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smollm_jax.data.batches import BatchSource
from smollm_jax.parallel import sharding
from smollm_jax.runtime.signals import StopSignal
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.loss import NEXT_TOKEN, Objective, data_parallel, mean_loss


@functools.partial(jax.jit, static_argnames=("execution", "objective"))
def eval_step(
    model: Any, batch: Any, frozen: Any = None, *, execution: ExecutionConfig, objective: Objective = NEXT_TOKEN
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The mean loss of a batch and the objective's other means, computed on all devices."""
    out_specs = (sharding.REPLICATED, sharding.REPLICATED)
    return data_parallel(mean_loss, model, batch, execution, objective, frozen, out_specs=out_specs)


def shard_padded_batch(batch: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """A batch sharded over the mesh, padded with rows of -1 (no loss) to a multiple of its devices."""

    def padded(array: np.ndarray) -> np.ndarray:
        rows = (0, -len(array) % (1 if mesh is None else mesh.size))
        return np.pad(array, (rows, *[(0, 0)] * (array.ndim - 1)), constant_values=-1)

    batch = jax.tree.map(padded, batch)
    shapes = jax.tree.map(lambda array: array.shape, batch)
    return sharding.shard_batch(lambda rows: jax.tree.map(lambda array: array[rows], batch), shapes, mesh)


def validation_means(
    model: Any,
    batches: BatchSource,
    count: int,
    execution: ExecutionConfig,
    stop: StopSignal | None = None,
    *,
    objective: Objective = NEXT_TOKEN,
    frozen: Any = None,
) -> dict[str, float] | None:
    """The mean "loss" over up to `count` held-out batches and the objective's other means; None if a signal arrives
    meanwhile, or if nothing is held out."""
    means, sizes = [], []
    for batch in batches.validation(count):
        if stop:
            return None
        on_devices = shard_padded_batch(batch, execution.mesh)
        loss, metrics = eval_step(model, on_devices, frozen, execution=execution, objective=objective)
        means.append({"loss": loss, **metrics})
        sizes.append(int(objective.count(jax.tree.map(jnp.asarray, batch), execution)))
    if not sum(sizes):
        return None
    pairs = list(zip(means, sizes, strict=True))
    return {name: sum(float(mean[name]) * size for mean, size in pairs) / sum(sizes) for name in means[0]}
