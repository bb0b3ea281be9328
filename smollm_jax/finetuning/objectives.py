"""What fine-tuning minimizes: the loss of the learnt tokens of examples, or of pairs of answers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from smollm_jax.config.finetune_recipe import PairLoss
from smollm_jax.model.attention import packed
from smollm_jax.model.cross_entropy import linear_cross_entropy, linear_log_probs
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


def answer_log_probs(model: SmolLM, batch: Any, execution: ExecutionConfig) -> Float[Array, "B 2"]:
    """The log-probability of each answer of a batch of pairs: summed over its tokens, the one that ends it included."""
    B, _, T = batch["tokens"].shape
    tokens, documents = (batch[name].reshape(2 * B, T) for name in ("tokens", "documents"))
    hidden = row_states(model, tokens, documents, execution)
    hidden = hidden.reshape(2 * B * T, -1)
    log_probs = linear_log_probs(hidden, model.head, batch["targets"].reshape(-1), operands=execution.operands)
    return log_probs.reshape(B, 2, T).sum(axis=2)


def pair_losses(
    log_ratios: Float[Array, "B 2"],
    lengths: Int[Array, "B 2"],
    loss_type: PairLoss,
    beta: float,
    label_smoothing: float,
) -> Float[Array, "B"]:
    """The loss of each pair from its answers' log-ratios, log p - log p of the reference, and their learnt tokens.

    Source: trl 1.16, dpo_trainer.py, `_compute_loss`. sigmoid: Rafailov et al. 2023, equation 7; ipo: Azar et al. 2023,
    equation 17, per token; apo_zero: D'Oosterlinck et al. 2024, equation 7; robust: Chowdhury et al. 2024, equation 8.
    """
    chosen, rejected = log_ratios[:, 0], log_ratios[:, 1]
    logits = beta * (chosen - rejected)
    if loss_type == "ipo":
        per_token = log_ratios / jnp.maximum(lengths, 1)
        return (per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta)) ** 2
    if loss_type == "apo_zero":
        return 1 - jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(beta * rejected)
    if loss_type == "robust":
        kept, swapped = -jax.nn.log_sigmoid(logits), -jax.nn.log_sigmoid(-logits)
        return ((1 - label_smoothing) * kept - label_smoothing * swapped) / (1 - 2 * label_smoothing)
    return -jax.nn.log_sigmoid(logits)


@dataclasses.dataclass(frozen=True)
class PreferencePairs:
    """Direct preference optimization: chosen answers become likelier than rejected ones, against a fixed reference.

    A batch is {"tokens", "targets", "documents"}, each `[B, 2, T]`, and "reference" `[B, 2]`, the answers'
    log-probabilities under the model that the run starts from. The loss is the mean over the pairs of the whole batch.
    """

    loss_type: PairLoss
    beta: float
    label_smoothing: float

    def count(self, batch: Any, execution: ExecutionConfig) -> Any:
        return _is_pair(batch).sum()

    def total(
        self, model: Any, batch: Any, execution: ExecutionConfig, frozen: Any
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        log_probs = answer_log_probs(model, batch, execution)
        lengths = (batch["targets"] >= 0).sum(axis=2)
        ratios = log_probs - batch["reference"]
        losses = pair_losses(ratios, lengths, self.loss_type, self.beta, self.label_smoothing)
        rewards = self.beta * ratios
        margins = rewards[:, 0] - rewards[:, 1]
        metrics = {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/accuracies": margins > 0,
            "rewards/margins": margins,
            "logps/chosen": log_probs[:, 0],
            "logps/rejected": log_probs[:, 1],
        }
        pairs = _is_pair(batch)
        total = lambda values: jnp.where(pairs, values, 0).sum()  # noqa: E731
        metrics = {name: jax.lax.stop_gradient(total(values.astype(losses.dtype))) for name, values in metrics.items()}
        return total(losses), metrics


def _is_pair(batch: Any) -> Bool[Array, "B"]:
    """Which rows of a batch are pairs and no padding."""
    return (batch["targets"] >= 0).any(axis=(1, 2))
