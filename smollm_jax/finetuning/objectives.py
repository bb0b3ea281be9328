"""What fine-tuning minimizes: the loss of rows of examples, of which only some tokens are learnt."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from smollm_jax.model.attention import packed
from smollm_jax.model.cross_entropy import linear_cross_entropy
from smollm_jax.model.smollm import SmolLM
from smollm_jax.training.execution import ExecutionConfig


def positions_of(documents: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Each token's position in its document, which is a stretch of equal numbers."""
    first = jnp.pad(documents[:, 1:] != documents[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    index = jnp.arange(documents.shape[1])
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def row_states(
    model: SmolLM, tokens: Int[Array, "B T"], documents: Int[Array, "B T"], execution: ExecutionConfig
) -> Float[Array, "B T D"]:
    """The last hidden states of rows whose documents do not see each other; padding, document -1, is one as well."""
    hidden, _ = model.hidden_states(
        jnp.maximum(tokens, 0),
        dtype=execution.dtype,
        operands=execution.operands,
        positions=positions_of(documents),
        attend=packed(documents, execution.attention, execution.operands),
        remat=execution.remat,
        unroll=execution.unroll,
    )
    return hidden


@dataclasses.dataclass(frozen=True)
class LearntTokens:
    """Supervised fine-tuning: cross-entropy over the tokens that have a target, averaged over all of a batch's.

    A batch is {"tokens", "targets", "documents"}, each `[B, T]`.
    """

    def count(self, batch: Any, execution: ExecutionConfig) -> Any:
        return (batch["targets"] >= 0).sum()

    def total(
        self, model: Any, batch: Any, execution: ExecutionConfig, frozen: Any
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        hidden = row_states(model, batch["tokens"], batch["documents"], execution)
        targets = batch["targets"].reshape(-1)
        hidden = hidden.reshape(targets.size, -1)
        return linear_cross_entropy(hidden, model.head, targets, operands=execution.operands), {}
