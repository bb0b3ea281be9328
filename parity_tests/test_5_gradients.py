"""Rung 5: float32 gradients of the full model, per tensor, against float64, the twin and transformers."""

import numpy as np
import pytest
import torch

import smollm_torch.loss
import smollm_torch.train
import smollm_torch.weights
from smollm_jax import weights
from smollm_parity import ladder, metrics
from smollm_parity.tolerances import (
    FLOAT32_GRADIENTS,
    FLOAT32_GRADIENTS_BETWEEN,
    FLOAT32_LOSS,
    FLOAT32_LOSS_BETWEEN,
    within,
)


@pytest.fixture(scope="module")
def ours(bundle, window):
    return ladder.jax_gradients(bundle, window, "float32")


def test_gradients_are_close_to_the_truth(ours, true_gradient):
    errors = metrics.gradient_errors(ours[1], true_gradient[1])
    assert len(errors) == 272
    assert min(errors.values()) > 0, "computed in float64"
    within(max(errors.values()), FLOAT32_GRADIENTS, "float32 gradients against the truth, worst tensor")
    within(abs(ours[0] / true_gradient[0] - 1), FLOAT32_LOSS, "float32 loss against the truth")


@pytest.mark.parametrize("backend", ["twin", "hf"])
def test_gradients_equal_pytorchs(backend, ours, window, request):
    loss, theirs = ladder.torch_gradients(request.getfixturevalue(backend), window)
    errors = metrics.gradient_errors(ours[1], theirs)
    within(max(errors.values()), FLOAT32_GRADIENTS_BETWEEN, f"float32 gradients against {backend}, worst tensor")
    within(abs(ours[0] / loss - 1), FLOAT32_LOSS_BETWEEN, f"float32 loss against {backend}")


def test_jax_is_no_further_from_the_truth_than_transformers(ours, hf, window, true_gradient):
    theirs = metrics.gradient_errors(ladder.torch_gradients(hf, window)[1], true_gradient[1])
    errors = metrics.gradient_errors(ours[1], true_gradient[1])
    within(max(errors.values()) / max(theirs.values()), 1.5, "float32 gradient error over transformers', worst tensor")


def test_the_twins_loss_in_chunks_is_its_loss(tiny_model, monkeypatch):
    """The chunked loss of the benchmark, on 37 tokens in chunks of 10, against all logits at once in float64."""
    monkeypatch.setattr(smollm_torch.loss, "CPU_CHUNK_TOKENS", 10)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 1000, (1, 38)))
    values, gradients = [], []
    for module in (smollm_torch.train, smollm_torch.loss):
        twin = smollm_torch.weights.from_bundle(weights.to_bundle(tiny_model), torch.float64)
        loss = 0.3 * module.mean_loss(twin, tokens, torch.float64)
        loss.backward()
        values.append(loss.item())
        gradients.append({name: p.grad.numpy() for name, p in twin.named_parameters()})
    assert values[1] == pytest.approx(values[0], rel=1e-13)
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(
            gradients[1][name], gradient, rtol=1e-11, atol=1e-13 * np.abs(gradient).max(), err_msg=name
        )
