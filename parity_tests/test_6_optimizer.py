"""Rung 6: a step of optax's AdamW equals torch's, with and without clipping, and so does the schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import smollm_torch.train
from smollm_jax.config import Recipe
from smollm_jax.training import optimizer
from smollm_parity.tolerances import ADAMW_STEP, TORCH_CLIP, within

SHAPES = {"embed_tokens": (50, 8), "layers.mlp": (2, 8, 16), "norm": (8,)}


def recipe(**changes) -> Recipe:
    base = {"steps": 20, "batch_size": 1, "sequence_length": 8, "learning_rate": 3e-3, "warmup_steps": 0}
    return Recipe(**(base | {"dtype": "float64", "weight_decay": 0.1} | changes))


def arrays(seed, scale):
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=shape) * scale for name, shape in SHAPES.items()}


@pytest.mark.parametrize("clip", ["on", "off"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("gradient", [1.0, 1e-7])
def test_adamw(clip, steps, gradient):
    """Parameters after 1 and 3 steps, compared with torch's own AdamW and torch's own clip."""
    if clip == "on" and gradient < 1:
        gradient = 0.5  # the norm of 464 numbers: 11
    chosen = recipe(clip=1.0 if clip == "on" else 1e9)
    with jax.enable_x64(True):
        ours = jax.tree.map(jnp.asarray, arrays(0, 0.3))
        tx = optimizer.adamw(chosen)
        state = tx.init(ours)
        theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in arrays(0, 0.3).items()}
        adamw = torch.optim.AdamW(theirs.values(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for step in range(steps):
            gradients = arrays(step + 1, gradient)
            updates, state = tx.update(jax.tree.map(jnp.asarray, gradients), state, ours)
            ours = optax.apply_updates(ours, updates)
            for name, parameter in theirs.items():
                parameter.grad = torch.tensor(gradients[name])
            torch.nn.utils.clip_grad_norm_(theirs.values(), chosen.clip)
            adamw.step()
        for name, parameter in theirs.items():
            moved = np.abs(parameter.detach().numpy() - arrays(0, 0.3)[name]).max()
            error = np.abs(np.asarray(ours[name]) - parameter.detach().numpy()).max() / moved
            within(error, TORCH_CLIP if clip == "on" else ADAMW_STEP, f"AdamW, {name}, clip {clip}")


def test_every_parameter_decays_norms_and_embedding_too():
    with jax.enable_x64(True):
        ours = jax.tree.map(jnp.asarray, arrays(0, 0.3))
        tx = optimizer.adamw(recipe())
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, ours), tx.init(ours), ours)
        for name, update in updates.items():
            np.testing.assert_allclose(update, -3e-3 * 0.1 * ours[name], rtol=1e-12)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_learning_rate_is_the_twins_at_every_step(schedule, warmup):
    chosen = recipe(schedule=schedule, steps=50, warmup_steps=warmup)
    with jax.enable_x64(True):
        rate = optimizer.learning_rate(chosen)
        for step in range(51):
            difference = abs(float(rate(step)) - smollm_torch.train.learning_rate(chosen, step))
            within(difference / chosen.learning_rate, 1e-12, f"learning rate, {schedule}, step {step}")
