"""The loss on held-out batches."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from smollm_jax.data.batches import Batches
from smollm_jax.model.smollm import SmolLM
from smollm_jax.parallel import sharding
from smollm_jax.runtime.signals import StopSignal
from smollm_jax.training.execution import Compute
from smollm_jax.training.loss import mean_loss, over_devices


@functools.partial(jax.jit, static_argnames="compute")
def eval_step(model: SmolLM, tokens: Int[Array, "B window"], compute: Compute) -> Float[Array, ""]:
    """The mean loss over windows, on all devices."""
    return over_devices(mean_loss, model, tokens, compute, out_specs=sharding.REPLICATED)


def put_padded(tokens: np.ndarray, mesh: jax.sharding.Mesh | None) -> Array:
    """Rows on their devices, with rows of -1, which count nothing, up to a number that the devices divide."""
    if mesh is not None:
        tokens = np.pad(tokens, ((0, -len(tokens) % mesh.size), (0, 0)), constant_values=-1)
    return sharding.shard_batch(lambda rows: tokens[rows], tokens.shape, mesh)


def validation_loss(
    model: SmolLM, batches: Batches, count: int, compute: Compute, stop: StopSignal | None = None
) -> float | None:
    """The mean loss over up to `count` batches of held-out tokens; None when a signal came in between."""
    losses = []
    for tokens in batches.validation(count):
        if stop:
            return None
        learnt = tokens[:, 1:].size if compute.document_end is None else (tokens[:, :-1] != compute.document_end).sum()
        losses.append((eval_step(model, put_padded(tokens, compute.mesh), compute), int(learnt)))
    return sum(float(loss) * learnt for loss, learnt in losses) / sum(learnt for _, learnt in losses)
