"""Rung 1: in float64, JAX and the PyTorch twin are the same function up to rounding."""

import numpy as np
import pytest
import torch

import smollm_torch.weights
from smollm_parity import ladder, metrics
from smollm_parity.tolerances import FLOAT64_GRADIENTS, FLOAT64_LOGITS, within


@pytest.fixture(scope="module")
def exact_twin(bundle):
    return smollm_torch.weights.from_bundle(bundle, torch.float64)


def test_logits_and_every_layer_are_equal(exact_twin, short, truth):
    stream, logits = ladder.torch_stream(exact_twin, short)
    assert logits.dtype == truth[1].dtype == np.float64
    within(np.abs(logits - truth[1]).max() / np.abs(truth[1]).max(), FLOAT64_LOGITS, "float64 logits")
    within(np.abs(stream - truth[0]).max() / np.abs(truth[0]).max(), FLOAT64_LOGITS, "float64 residual stream")


def test_gradients_are_equal(exact_twin, window, true_gradient):
    loss, gradient = ladder.torch_gradients(exact_twin, window)
    errors = metrics.gradient_errors(gradient, true_gradient[1])
    assert len(errors) == 272
    within(max(errors.values()), FLOAT64_GRADIENTS, "float64 gradients")
    within(abs(loss / true_gradient[0] - 1), 1e-12, "float64 loss")


@pytest.mark.overnight
def test_they_are_equal_at_2048_tokens(exact_twin, bundle, real_tokens):
    logits = ladder.torch_stream(exact_twin, real_tokens)[1]
    ours = ladder.jax_stream(bundle, real_tokens, "float64")[1]
    within(np.abs(ours - logits).max() / np.abs(logits).max(), FLOAT64_LOGITS, "float64 logits, T=2048")
    del logits, ours
    tokens = np.concatenate([real_tokens, real_tokens[:, :1]], axis=1)
    errors = metrics.gradient_errors(
        ladder.jax_gradients(bundle, tokens, "float64", remat="full")[1], ladder.torch_gradients(exact_twin, tokens)[1]
    )
    within(max(errors.values()), FLOAT64_GRADIENTS, "float64 gradients, T=2048")
