"""The learning rate at every edge of the schedule, and which parameters AdamW decays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smollm_jax.config import Recipe
from smollm_jax.errors import UsageError
from smollm_jax.training import optimizer


def recipe(**changes) -> Recipe:
    base = {"steps": 100, "batch_size": 2, "sequence_length": 8, "learning_rate": 3e-3, "warmup_steps": 10}
    return Recipe(**(base | {"dtype": "float32"} | changes))


def test_wsd_at_every_edge():
    rate = optimizer.learning_rate(recipe())
    expected = {0: 0.0, 1: 3e-4, 9: 2.7e-3, 10: 3e-3, 79: 3e-3, 80: 3e-3, 81: 2.85e-3, 99: 1.5e-4, 100: 0.0}
    for step, value in expected.items():
        assert float(rate(step)) == pytest.approx(value, rel=1e-5, abs=1e-9), step


def test_cosine_at_every_edge():
    rate = optimizer.learning_rate(recipe(schedule="cosine"))
    for step, value in {0: 0.0, 5: 1.5e-3, 10: 3e-3, 55: 1.5e-3, 100: 0.0}.items():
        assert float(rate(step)) == pytest.approx(value, rel=1e-5, abs=1e-9), step


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_without_warmup_the_first_step_has_the_peak(schedule):
    assert float(optimizer.learning_rate(recipe(warmup_steps=0, schedule=schedule))(0)) == pytest.approx(3e-3)


def test_decay_is_on_every_parameter_norms_and_embedding_too(tiny_model):
    tx = optimizer.adamw(recipe(warmup_steps=0, weight_decay=0.1))
    zero = jax.tree.map(jnp.zeros_like, tiny_model)
    updates, _ = tx.update(zero, tx.init(tiny_model), tiny_model)
    for update, parameter in zip(jax.tree.leaves(updates), jax.tree.leaves(tiny_model), strict=True):
        np.testing.assert_allclose(update, -3e-3 * 0.1 * parameter, rtol=1e-5)


@pytest.mark.parametrize("limit", [2.0, 1e3])
def test_clipping_is_optax_own(limit):
    """Equal where nothing is clipped; otherwise within three roundings of 2^-24, two of them ours."""
    draw = np.random.default_rng(0)
    gradients = {"a": draw.normal(size=(64, 64)), "b": 1e-6 * draw.normal(size=7)}  # the norm is 64
    gradients = {name: jnp.asarray(gradient, jnp.float32) for name, gradient in gradients.items()}
    empty = optax.EmptyState()
    ours, _ = optimizer.clip_by_global_norm(limit).update(gradients, empty)
    known, _ = optimizer.clip_by_global_norm(limit).update(gradients, empty, norm=optax.tree.norm(gradients))
    theirs, _ = optax.clip_by_global_norm(limit).update(gradients, empty)
    assert (limit < 64) == bool((theirs["a"] != gradients["a"]).all())
    for name, gradient in theirs.items():
        np.testing.assert_array_equal(known[name], ours[name])
        np.testing.assert_allclose(ours[name], gradient, rtol=3 * 2**-24 if limit < 64 else 0, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"learning_rate": float("nan")},
        {"learning_rate": -1.0},
        {"warmup_steps": 81},
        {"warmup_steps": 100, "schedule": "cosine"},
        {"seed": -1},
        {"beta2": 1.0},
        {"weight_decay": -0.1},
        {"clip": 0.0},
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_by_name(change):
    with pytest.raises(UsageError, match=next(iter(change))):
        recipe(**change)
