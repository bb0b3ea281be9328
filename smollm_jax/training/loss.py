"""The loss of a batch and its gradients: targets, documents, micro-batches, devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

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


@runtime_checkable  # annotations are checked in tests
class Objective(Protocol):
    """What a step minimizes: a sum over a batch's rows, divided by a count over the whole batch.

    Hashable, so that the jitted step takes it as a static argument. `frozen` is what the loss reads and does not train.
    """

    def count(self, batch: Any, execution: ExecutionConfig) -> Any:
        """How many terms the summed loss of these rows has; padding rows have none."""
        ...

    def total(
        self, model: Any, batch: Any, execution: ExecutionConfig, frozen: Any
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The summed loss of these rows, and further sums to log, by name; each is divided by the count too."""
        ...


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Pre-training: every token of a window of T + 1 tokens is learnt from those before it."""

    def count(self, batch: Any, execution: ExecutionConfig) -> Any:
        return (shift_targets(batch, execution) >= 0).sum()

    def total(
        self, model: Any, batch: Any, execution: ExecutionConfig, frozen: Any
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        return total_loss(model, batch, execution), {}


NEXT_TOKEN = NextToken()


def mean_loss(
    model: Any,
    batch: Any,
    execution: ExecutionConfig,
    count: Int[Array, ""] | None = None,
    objective: Objective = NEXT_TOKEN,
    frozen: Any = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The objective's sums divided by its count, or by `count` if these rows are only part of a batch."""
    total, metrics = objective.total(model, batch, execution, frozen)
    terms = objective.count(batch, execution) if count is None else count
    return total / terms, {name: value / terms for name, value in metrics.items()}


def mean_gradients(
    model: Any,
    batch: Any,
    execution: ExecutionConfig,
    count: Int[Array, ""] | None = None,
    objective: Objective = NEXT_TOKEN,
    frozen: Any = None,
) -> tuple[tuple[Float[Array, ""], dict[str, Array]], Any]:
    """`mean_loss` and its gradients. Accumulates over `accumulation_steps` micro-batches; sums in float32."""
    count = objective.count(batch, execution) if count is None else count
    learn = jax.value_and_grad(mean_loss, has_aux=True)
    if execution.accumulation_steps == 1:
        return learn(model, batch, execution, count, objective, frozen)
    micro_batches = jax.tree.map(lambda x: x.reshape(execution.accumulation_steps, -1, *x.shape[1:]), batch)

    def add(total: Any, micro_batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, learn(model, micro_batch, execution, count, objective, frozen)), None

    first = jax.tree.map(lambda x: x[0], micro_batches)
    shapes = jax.eval_shape(lambda: learn(model, first, execution, count, objective, frozen))
    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), micro_batches)[0]


def data_parallel(
    per_shard: Callable[..., Any],
    model: Any,
    batch: Any,
    execution: ExecutionConfig,
    objective: Objective,
    frozen: Any,
    *,
    out_specs: Any,
) -> Any:
    """`mean_loss` or `mean_gradients` on each device's rows, summed over devices and sharded as `out_specs` says."""
    mesh = execution.mesh
    if mesh is None:
        return per_shard(model, batch, execution, None, objective, frozen)
    specs, frozen_specs = sharding.fsdp_specs(model, mesh), sharding.fsdp_specs(frozen, mesh)

    # check_vma=False: each device computes independently, and all reductions over devices are explicit here.
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs, sharding.BATCH_SPEC, frozen_specs),
        out_specs=out_specs,
        check_vma=False,
    )
    def shard_fn(shards: Any, batch: Any, frozen_shards: Any) -> Any:
        count = jax.lax.psum(objective.count(batch, execution), sharding.AXES)
        model = sharding.all_gather_params(shards, specs)
        frozen = sharding.all_gather_params(frozen_shards, frozen_specs)
        return sharding.reduce_scatter_grads(per_shard(model, batch, execution, count, objective, frozen), out_specs)

    return shard_fn(model, batch, frozen)
