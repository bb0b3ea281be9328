"""The loss of a batch and its gradients: targets, documents, micro-batches, devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from smollm_jax.model.attention import causal, packed
from smollm_jax.model.cross_entropy import linear_cross_entropy
from smollm_jax.model.smollm import SmolLM
from smollm_jax.parallel import sharding
from smollm_jax.training.execution import Compute


def targets_of(tokens: Int[Array, "B window"], compute: Compute) -> Int[Array, "B T"]:
    """The next token of every token, -1 where none is to be learnt: in rows of -1, and across documents' borders."""
    if compute.document_end is None:
        return tokens[:, 1:]
    return jnp.where(tokens[:, :-1] == compute.document_end, -1, tokens[:, 1:])


def within_documents(tokens: Int[Array, "B T"], document_end: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Each token's document, counted within its row, and its position in that document."""
    first = jnp.pad(tokens[:, :-1] == document_end, ((0, 0), (1, 0)))
    place = jnp.arange(tokens.shape[1])
    return jnp.cumsum(first, axis=1), place - jax.lax.cummax(jnp.where(first, place, 0), axis=1)


def total_loss(model: SmolLM, tokens: Int[Array, "B window"], compute: Compute) -> Float[Array, ""]:
    """The sum over windows of T + 1 tokens of the next token's -log probability, in nats; rows of -1 count nothing."""
    inputs, positions, attend = jnp.maximum(tokens[:, :-1], 0), None, causal(compute.implementation, compute.operands)
    if compute.document_end is not None:
        documents, positions = within_documents(inputs, compute.document_end)
        attend = packed(documents, compute.implementation, compute.operands)
    hidden, _ = model.hidden_states(
        inputs,
        dtype=compute.dtype,
        operands=compute.operands,
        positions=positions,
        attend=attend,
        remat=compute.remat,
        unroll=compute.unroll,
    )
    targets = targets_of(tokens, compute).reshape(-1)
    return linear_cross_entropy(hidden.reshape(targets.size, -1), model.head, targets, operands=compute.operands)


def mean_loss(
    model: SmolLM, tokens: Int[Array, "B window"], compute: Compute, count: Int[Array, ""] | None = None
) -> Float[Array, ""]:
    """`total_loss` over the number of its targets, or over `count` where these windows are a part of a batch."""
    return total_loss(model, tokens, compute) / ((targets_of(tokens, compute) >= 0).sum() if count is None else count)


def mean_gradients(
    model: SmolLM, tokens: Int[Array, "B window"], compute: Compute, count: Int[Array, ""] | None = None
) -> tuple[Float[Array, ""], SmolLM]:
    """The mean loss and its gradients; of equal parts of the rows, one after another, added up in float32."""
    count = (targets_of(tokens, compute) >= 0).sum() if count is None else count
    if compute.parts == 1:
        return jax.value_and_grad(mean_loss)(model, tokens, compute, count)
    parts = tokens.reshape(compute.parts, -1, tokens.shape[1])

    def add(total: Any, part: Int[Array, "b window"]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(mean_loss)(model, part, compute, count)), None

    shapes = jax.eval_shape(lambda: jax.value_and_grad(mean_loss)(model, parts[0], compute, count))
    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), parts)[0]


def over_devices(
    of_rows: Callable[..., Any], model: SmolLM, tokens: Int[Array, "B window"], compute: Compute, *, out_specs: Any
) -> Any:
    """`mean_loss` or `mean_gradients` of the rows of all devices, each result as its `out_specs` says."""
    mesh = compute.mesh
    if mesh is None:
        return of_rows(model, tokens, compute)
    specs = sharding.fsdp_specs(model, mesh)

    # Unchecked: each device computes for itself, and every sum over devices is written out here.
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(specs, sharding.BATCH_SPEC), out_specs=out_specs, check_vma=False
    )
    def on_each(shards: Any, tokens: Any) -> Any:
        count = jax.lax.psum((targets_of(tokens, compute) >= 0).sum(), sharding.AXES)
        return sharding.reduce_scatter_grads(
            of_rows(sharding.all_gather_params(shards, specs), tokens, compute, count), out_specs
        )

    return on_each(model, tokens)
