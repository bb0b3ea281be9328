"""The loss on held-out batches."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from smollm_jax.data.batches import Batches
from smollm_jax.model.smollm import SmolLM
from smollm_jax.parallel import sharding
from smollm_jax.runtime.signals import StopSignal
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.loss import data_parallel, mean_loss


@functools.partial(jax.jit, static_argnames="execution")
def eval_step(model: SmolLM, tokens: Int[Array, "B window"], execution: ExecutionConfig) -> Float[Array, ""]:
    """The mean loss over a batch of windows, computed on all devices."""
    return data_parallel(mean_loss, model, tokens, execution, out_specs=sharding.REPLICATED)


def shard_padded_batch(tokens: np.ndarray, mesh: jax.sharding.Mesh | None) -> Array:
    """A batch sharded over the mesh, padded with rows of -1 (no loss) to a multiple of its devices."""
    if mesh is not None:
        tokens = np.pad(tokens, ((0, -len(tokens) % mesh.size), (0, 0)), constant_values=-1)
    return sharding.shard_batch(lambda rows: tokens[rows], tokens.shape, mesh)


def validation_loss(
    model: SmolLM, batches: Batches, count: int, execution: ExecutionConfig, stop: StopSignal | None = None
) -> float | None:
    """The mean loss over up to `count` batches of held-out tokens; None if a signal arrives meanwhile."""
    losses = []
    for tokens in batches.validation(count):
        if stop:
            return None
        separator = execution.separator_id
        targets = tokens[:, 1:].size if separator is None else (tokens[:, :-1] != separator).sum()
        losses.append((eval_step(model, shard_padded_batch(tokens, execution.mesh), execution), int(targets)))
    return sum(float(loss) * targets for loss, targets in losses) / sum(targets for _, targets in losses)
