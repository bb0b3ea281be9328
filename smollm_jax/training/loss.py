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
from smollm_jax.training.execution import ExecutionConfig


def shift_targets(tokens: Int[Array, "B window"], execution: ExecutionConfig) -> Int[Array, "B T"]:
    """Each token's next token as its target; -1 (no loss) in padding rows of -1, and after the last token of a document
    if attention is masked across documents."""
    if execution.separator_id is None:
        return tokens[:, 1:]
    return jnp.where(tokens[:, :-1] == execution.separator_id, -1, tokens[:, 1:])


def segment_ids_and_positions(
    tokens: Int[Array, "B T"], separator_id: int
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Each token's document as a segment id, counted within its row, and its position in that document."""
    is_first = jnp.pad(tokens[:, :-1] == separator_id, ((0, 0), (1, 0)))
    index = jnp.arange(tokens.shape[1])
    return jnp.cumsum(is_first, axis=1), index - jax.lax.cummax(jnp.where(is_first, index, 0), axis=1)


def total_loss(model: SmolLM, tokens: Int[Array, "B window"], execution: ExecutionConfig) -> Float[Array, ""]:
    """Summed next-token cross-entropy over windows of T + 1 tokens, in nats; rows of -1 are padding without loss."""
    inputs, positions, attend = jnp.maximum(tokens[:, :-1], 0), None, causal(execution.attention, execution.operands)
    if execution.separator_id is not None:
        segment_ids, positions = segment_ids_and_positions(inputs, execution.separator_id)
        attend = packed(segment_ids, execution.attention, execution.operands)
    hidden, _ = model.hidden_states(
        inputs,
        dtype=execution.dtype,
        operands=execution.operands,
        positions=positions,
        attend=attend,
        remat=execution.remat,
        unroll=execution.unroll,
    )
    targets = shift_targets(tokens, execution).reshape(-1)
    return linear_cross_entropy(hidden.reshape(targets.size, -1), model.head, targets, operands=execution.operands)


def mean_loss(
    model: SmolLM, tokens: Int[Array, "B window"], execution: ExecutionConfig, count: Int[Array, ""] | None = None
) -> Float[Array, ""]:
    """`total_loss` divided by its number of targets, or by `count` if these windows are only part of a batch."""
    return total_loss(model, tokens, execution) / (
        (shift_targets(tokens, execution) >= 0).sum() if count is None else count
    )


def mean_gradients(
    model: SmolLM, tokens: Int[Array, "B window"], execution: ExecutionConfig, count: Int[Array, ""] | None = None
) -> tuple[Float[Array, ""], SmolLM]:
    """The mean loss and its gradients. Accumulates over `accumulation_steps` micro-batches; sums in float32."""
    count = (shift_targets(tokens, execution) >= 0).sum() if count is None else count
    if execution.accumulation_steps == 1:
        return jax.value_and_grad(mean_loss)(model, tokens, execution, count)
    micro_batches = tokens.reshape(execution.accumulation_steps, -1, tokens.shape[1])

    def add(total: Any, micro_batch: Int[Array, "b window"]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(mean_loss)(model, micro_batch, execution, count)), None

    shapes = jax.eval_shape(lambda: jax.value_and_grad(mean_loss)(model, micro_batches[0], execution, count))
    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), micro_batches)[0]


def data_parallel(
    per_shard: Callable[..., Any],
    model: SmolLM,
    tokens: Int[Array, "B window"],
    execution: ExecutionConfig,
    *,
    out_specs: Any,
) -> Any:
    """`mean_loss` or `mean_gradients` on each device's rows, summed over devices and sharded as `out_specs` says."""
    mesh = execution.mesh
    if mesh is None:
        return per_shard(model, tokens, execution)
    specs = sharding.fsdp_specs(model, mesh)

    # check_vma=False: each device computes independently, and all reductions over devices are explicit here.
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(specs, sharding.BATCH_SPEC), out_specs=out_specs, check_vma=False
    )
    def shard_fn(shards: Any, tokens: Any) -> Any:
        count = jax.lax.psum((shift_targets(tokens, execution) >= 0).sum(), sharding.AXES)
        return sharding.reduce_scatter_grads(
            per_shard(sharding.all_gather_params(shards, specs), tokens, execution, count), out_specs
        )

    return shard_fn(model, tokens)
