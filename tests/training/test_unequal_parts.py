"""Means over parts of a batch, or of a validation, that have different numbers of learnt tokens."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.training import validation
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.loss import NextToken, mean_gradients, shift_targets

END = 0
# Four windows of 4 targets, of which 4, 2, 3 and 0 are learnt where a document's first token is not.
WINDOWS = np.array([[1, 2, 3, 4, 5], [1, END, 3, END, 5], [1, END, 3, 4, 5], [END, END, END, END, 5]], np.int32)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A source of held-out batches."""

    batches: tuple[np.ndarray, ...]
    shapes: Any = None

    def batch(self, step: int, rows: slice = slice(None)) -> Any:
        raise NotImplementedError

    def windows_of(self, step: int) -> list[str]:
        raise NotImplementedError

    def validation(self, batches: int) -> Iterator[np.ndarray]:
        yield from self.batches[:batches]


@pytest.mark.parametrize(("separator_id", "counts"), [(None, (12, 4)), (END, (9, 0))])
def test_a_validation_weighs_each_batch_by_the_tokens_learnt_of_it(monkeypatch, separator_id, counts):
    """Its batches have 3 rows and 1; where documents are masked, not every token is learnt."""
    means = {3: (2.0, 10.0), 1: (6.0, 30.0)}  # by the rows of a batch

    def eval_step(model, batch, frozen, **_):
        loss, metric = means[len(batch)]
        return jnp.float32(loss), {"metric": jnp.float32(metric)}

    monkeypatch.setattr(validation, "eval_step", eval_step)
    execution = ExecutionConfig("float32", separator_id=separator_id)
    source = HeldOut((WINDOWS[:3], WINDOWS[3:]))
    result = validation.validation_means(None, source, 2, execution)
    total = sum(counts)
    assert result == {
        "loss": pytest.approx((2 * counts[0] + 6 * counts[1]) / total),
        "metric": pytest.approx((10 * counts[0] + 30 * counts[1]) / total),
    }
    assert validation.validation_means(None, source, 1, execution) == {"loss": 2.0, "metric": 10.0}
    assert validation.validation_means(None, HeldOut(()), 2, execution) is None


@dataclasses.dataclass(frozen=True)
class Product(NextToken):
    """A weight times the sum of the learnt tokens, in place of a model's loss."""

    def total(self, model: Any, batch: Any, execution: ExecutionConfig, frozen: Any) -> Any:
        targets = shift_targets(batch, execution)
        total = jnp.where(targets >= 0, targets, 0).sum()
        return model["w"] * total, {"metric": 2.0 * total}


@pytest.mark.parametrize("accumulation_steps", [1, 2, 4])
def test_micro_batches_add_up_to_the_mean_over_all_learnt_tokens(accumulation_steps):
    """Not to a mean of their means: the last of four has no learnt token, the first has four."""
    execution = ExecutionConfig("float32", accumulation_steps=accumulation_steps, separator_id=END)
    learnt = np.array(shift_targets(jnp.asarray(WINDOWS), execution))
    mean = learnt[learnt >= 0].sum() / (learnt >= 0).sum()
    assert (learnt >= 0).sum(axis=1).tolist() == [4, 2, 3, 0]
    (loss, metrics), gradients = mean_gradients(
        {"w": jnp.float32(3)}, jnp.asarray(WINDOWS), execution, objective=Product()
    )
    assert float(loss) == pytest.approx(3 * mean)
    assert float(gradients["w"]) == pytest.approx(mean)
    assert float(metrics["metric"]) == pytest.approx(2 * mean)
