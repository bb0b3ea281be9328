"""From the same weights on the same batches, the JAX trainer and the twin's take the same steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import smollm_torch.train
import smollm_torch.weights
from parity_tests.tolerances import TRAINING_FLOAT32, TRAINING_FLOAT64
from smollm_jax import data, optimizer, train, weights
from smollm_jax.recipe import Recipe

STEPS = 10


@pytest.fixture(scope="module")
def token_file(text_path, tokenizer_path, tmp_path_factory):
    return data.prepare(text_path / "1861-Lincoln-1.txt", tokenizer_path, tmp_path_factory.mktemp("data"))


def recipe(dtype, **changes):
    base = {"steps": STEPS, "batch_size": 2, "sequence_length": 64, "learning_rate": 3e-3, "warmup_steps": 2}
    return Recipe(**(base | {"dtype": dtype, "weight_decay": 0.1} | changes))


def jax_curve(model, recipe, batches):
    tx = optimizer.adamw(recipe)
    state, rows = train.begin(model, tx), []
    for step in range(recipe.steps):
        tokens = jnp.asarray(batches.batch(step))
        state, metrics = train.train_step(state, tokens, tx=tx, compute=train.Compute(recipe.dtype))
        rows.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    return np.array(rows), state.model


def torch_curve(module, recipe, batches):
    optimizer, rows = smollm_torch.train.adamw(module.train(), recipe), []
    for step in range(recipe.steps):
        tokens = torch.from_numpy(batches.batch(step).astype(np.int64))
        metrics = smollm_torch.train.train_step(module, optimizer, tokens, recipe, step)
        rows.append((metrics["loss"], metrics["gradient_norm"]))
    return np.array(rows)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", TRAINING_FLOAT32), ("float64", TRAINING_FLOAT64)])
@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_losses_and_gradient_norms_agree_at_every_step(tiny, token_file, dtype, tolerance, schedule):
    with jax.enable_x64(dtype == "float64"):
        chosen = recipe(dtype, schedule=schedule)
        batches = data.Batches(token_file, chosen)
        model = train.fresh(tiny, seed=0)
        module = smollm_torch.weights.from_bundle(weights.to_bundle(model), getattr(torch, dtype))
        model = jax.tree.map(lambda x: x.astype(dtype), model)
        ours, _ = jax_curve(model, chosen, batches)
        theirs = torch_curve(module, chosen, batches)
        error = np.abs(ours / theirs - 1)
        print(f"{dtype}, {schedule}: largest difference of loss {error[:, 0].max():.1e}, norm {error[:, 1].max():.1e}")
        assert ours[-1, 0] < ours[0, 0] - 0.5, "nothing was learned: the curves would agree anyway"
        assert error[:, 0].max() < tolerance
        assert error[:, 1].max() < tolerance
        assert ours[0, 1] > chosen.clip, "no gradient was clipped"


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_learning_rate_is_the_same_at_every_step(schedule):
    chosen = recipe("float32", schedule=schedule, steps=50, warmup_steps=7)
    rate = optimizer.learning_rate(chosen)
    for step in range(51):
        assert float(rate(step)) == pytest.approx(smollm_torch.train.learning_rate(chosen, step), rel=1e-5, abs=1e-9)


def test_held_out_loss_is_the_same(tiny, token_file):
    chosen = recipe("float32")
    batches = data.Batches(token_file, dataclasses.replace(chosen, validation_fraction=0.2))
    model = train.fresh(tiny, seed=0)
    module = smollm_torch.weights.from_bundle(weights.to_bundle(model))
    ours = train.validation_loss(model, batches, 3, train.Compute("float32"))
    assert ours == pytest.approx(smollm_torch.train.validation_loss(module, chosen, batches, 3), rel=1e-6)
