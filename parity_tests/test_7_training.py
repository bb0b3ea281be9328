"""Rung 7: from the same weights on the same batches, the JAX trainer and the twin's trainer take the same steps."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import smollm_torch.train
import smollm_torch.weights
from smollm_jax import weights
from smollm_jax.config import Recipe, preset
from smollm_jax.data.batches import Batches
from smollm_jax.data.mixture import open_mixture
from smollm_jax.training import optimizer, train_step
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.state import init_model, init_train_state
from smollm_jax.training.validation import validation_means
from smollm_parity.ladder import precisely
from smollm_parity.tolerances import (
    TRAINING_BFLOAT16,
    TRAINING_FLOAT32_FULL,
    TRAINING_FLOAT32_RATIO,
    TRAINING_FLOAT32_SHORT,
    TRAINING_FLOAT64,
    TRAINING_FLOAT64_SHORT,
    within,
)

STEPS = 10
HUNDRED = {"steps": 100, "warmup_steps": 10, "batch_size": 1, "sequence_length": 32}


@pytest.fixture(scope="module")
def token_file(text_path, tokenizer_path, tmp_path_factory):
    return open_mixture(text_path / "1861-Lincoln-1.txt", tokenizer_path, tmp_path_factory.mktemp("data"))


def recipe(dtype, **changes):
    base = {"steps": STEPS, "batch_size": 2, "sequence_length": 64, "learning_rate": 3e-3, "warmup_steps": 2}
    return Recipe(**(base | {"dtype": dtype, "weight_decay": 0.1} | changes))


def jax_curve(model, recipe, batches, **execution):
    execution = ExecutionConfig(**({"dtype": recipe.dtype} | execution))
    tx = optimizer.adamw(recipe)
    state, rows = init_train_state(model, tx), []
    for step in range(recipe.steps):
        tokens = jnp.asarray(batches.batch(step))
        state, metrics = train_step.train_step(state, tokens, tx=tx, execution=execution)
        rows.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    return np.array(rows), state.model


def torch_curve(module, recipe, batches):
    optimizer, rows = smollm_torch.train.adamw(module.train(), recipe), []
    for step in range(recipe.steps):
        tokens = torch.from_numpy(batches.batch(step).astype(np.int64))
        metrics = smollm_torch.train.train_step(module, optimizer, tokens, recipe, step)
        rows.append((metrics["loss"], metrics["gradient_norm"]))
    return np.array(rows)


def both_curves(config, chosen, batches):
    """Loss and gradient norm of every step `[steps, 2]`, ours and the twin's, from the same fresh weights."""
    with precisely(chosen.dtype):
        model = init_model(config, seed=0)
        bundle = weights.to_bundle(model)
        module = smollm_torch.weights.from_bundle(bundle, getattr(torch, chosen.dtype))
        ours, _ = jax_curve(weights.from_bundle(bundle, chosen.dtype), chosen, batches)
    return ours, torch_curve(module, chosen, batches)


@pytest.mark.parametrize("schedule", ["wsd", pytest.param("cosine", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", TRAINING_FLOAT32_SHORT), ("float64", TRAINING_FLOAT64_SHORT)])
def test_ten_steps(tiny, token_file, dtype, bound, schedule):
    chosen = recipe(dtype, schedule=schedule)
    ours, theirs = both_curves(tiny, chosen, Batches(token_file, chosen))
    error = np.abs(ours / theirs - 1)
    within(error[:, 0].max(), bound, f"loss of 10 steps, {dtype}, {schedule}")
    within(error[:, 1].max(), bound, f"gradient norm of 10 steps, {dtype}, {schedule}")
    assert ours[-1, 0] < ours[0, 0] - 0.5, "nothing was learned: the curves would agree anyway"
    assert ours[0, 1] > chosen.clip, "no gradient was clipped"


@pytest.fixture(scope="module")
def truth(tiny, token_file):
    """The losses of 100 steps `[100]` in float64, ours and the twin's."""
    chosen = recipe("float64", **HUNDRED)
    return [curve[:, 0] for curve in both_curves(tiny, chosen, Batches(token_file, chosen))]


@pytest.mark.slow
def test_a_hundred_steps_in_float64(truth):
    ours, theirs = truth
    within(np.abs(ours / theirs - 1).max(), TRAINING_FLOAT64, "loss of 100 steps, float64")
    assert ours[-1] < ours[0] - 2


def permute(module, seed):
    """The same function with permuted hidden and MLP channels, which changes the order of nearly every sum."""
    draw, config = np.random.default_rng(seed), module.config
    hidden = torch.from_numpy(draw.permutation(config.hidden_size))
    inner = [torch.from_numpy(draw.permutation(config.intermediate_size)) for _ in module.model.layers]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.copy_(parameter[hidden])
            else:  # hidden channels come last: embeddings, norms and every product of the residual stream
                parameter.copy_(parameter[..., hidden])
        for layer, order in zip(module.model.layers, inner, strict=True):
            layer.mlp.gate_proj.weight.copy_(layer.mlp.gate_proj.weight[order])
            layer.mlp.up_proj.weight.copy_(layer.mlp.up_proj.weight[order])
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
    return module


@pytest.mark.slow
def test_a_hundred_steps_in_float32_are_as_near_the_truth_as_the_twin(tiny, token_file, truth):
    chosen = recipe("float32", **HUNDRED)
    batches = Batches(token_file, chosen)
    ours, theirs = both_curves(tiny, chosen, batches)
    bundle = weights.to_bundle(init_model(tiny, seed=0))
    others = [torch_curve(permute(smollm_torch.weights.from_bundle(bundle), seed), chosen, batches) for seed in (0, 1)]

    def error(*curves):
        return np.sqrt(np.mean([np.square(curve[:, 0] / truth[1] - 1) for curve in curves]))

    print(f"100 float32 steps, RMS against float64: JAX {error(ours):.2e}, the twin", end="")
    print("".join(f" {error(curve):.2e}" for curve in (theirs, *others)))
    within(
        error(ours) / error(theirs, *others), TRAINING_FLOAT32_RATIO, "RMS error of 100 losses, float32, over PyTorch's"
    )


@pytest.mark.overnight
def test_ten_steps_at_the_full_shape(token_file):
    chosen = recipe("float32", batch_size=1, sequence_length=256, learning_rate=1e-3)
    ours, theirs = both_curves(preset("smollm2-135m-pretrain"), chosen, Batches(token_file, chosen))
    within(np.abs(ours / theirs - 1)[:, 0].max(), TRAINING_FLOAT32_FULL, "loss of 10 steps at 134.5M parameters")
    assert ours[-1, 0] < ours[0, 0] - 1


@pytest.mark.parametrize(
    "results", [pytest.param("bfloat16", marks=pytest.mark.slow), "float32"], ids=["as a GPU", "as a CPU"]
)
def test_bfloat16_curves_stay_together_and_losses_are_float32(tiny, token_file, results):
    chosen = recipe("bfloat16")
    bundle = weights.to_bundle(init_model(tiny, seed=0))
    execution = {"dtype": results, "operands": "bfloat16"}
    ours, _ = jax_curve(weights.from_bundle(bundle), chosen, Batches(token_file, chosen), **execution)
    theirs = torch_curve(smollm_torch.weights.from_bundle(bundle), chosen, Batches(token_file, chosen))
    within(np.abs(ours / theirs - 1)[:, 0].max(), TRAINING_BFLOAT16, "loss of 10 steps, bfloat16")
    for losses in (ours[:, 0], theirs[:, 0]):
        rounded = torch.tensor(losses).to(torch.bfloat16).double().numpy()
        assert (rounded != losses).sum() > 7, "losses were rounded to bfloat16"


def test_held_out_loss_is_the_same(tiny, token_file):
    chosen = recipe("float32")
    batches = Batches(token_file, dataclasses.replace(chosen, validation_fraction=0.2))
    model = init_model(tiny, seed=0)
    module = smollm_torch.weights.from_bundle(weights.to_bundle(model))
    ours = validation_means(model, batches, 3, ExecutionConfig("float32"))["loss"]
    assert ours == pytest.approx(smollm_torch.train.validation_loss(module, chosen, batches, 3), rel=1e-6)
