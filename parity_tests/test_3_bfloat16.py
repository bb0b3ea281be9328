"""Rung 3: in bfloat16, JAX's distributions are no further from float64 than transformers'."""

import numpy as np
import pytest
import torch

from parity_tests.conftest import load_hf
from smollm_parity import ladder, metrics
from smollm_parity.tolerances import (
    AUTOCAST_GRADIENT_RATIO,
    AUTOCAST_KL_RATIO,
    BFLOAT16_ARGMAX_LOSS,
    BFLOAT16_KL_RATIO,
    BFLOAT16_PERPLEXITY,
    within,
)


def test_distributions_are_no_further_from_the_truth(bundle, weights_path, texts, texts_truth):
    theirs = ladder.torch_stream(load_hf(weights_path, dtype=torch.bfloat16), texts)
    ours = ladder.jax_stream(bundle, texts, "bfloat16")
    jax_metrics, torch_metrics = (metrics.distribution(backend[1], texts_truth[1], texts) for backend in (ours, theirs))
    exact = metrics.distribution(texts_truth[1], texts_truth[1], texts)
    print("truth", exact, "JAX", jax_metrics, "transformers", torch_metrics)
    assert jax_metrics["kl"] > 1e-5, "the bfloat16 model was computed in float32"
    within(jax_metrics["kl"] / torch_metrics["kl"], BFLOAT16_KL_RATIO, "bfloat16 KL over transformers'")
    within(
        torch_metrics["argmax"] - jax_metrics["argmax"],
        BFLOAT16_ARGMAX_LOSS,
        "bfloat16 argmaxes lost against transformers",
    )
    within(
        abs(jax_metrics["perplexity"] / exact["perplexity"] - 1),
        BFLOAT16_PERPLEXITY,
        "bfloat16 perplexity against the truth",
    )


@pytest.mark.slow
def test_float32_results_of_bfloat16_operands_are_nearer_to_the_truth_than_autocast(
    bundle, weights_path, texts, texts_truth
):
    theirs = ladder.autocast_logits(load_hf(weights_path, dtype=torch.float32), texts)
    ours = ladder.jax_operand_logits(bundle, texts)
    jax_metrics, torch_metrics = (metrics.distribution(logits, texts_truth[1], texts) for logits in (ours, theirs))
    print("JAX", jax_metrics, "autocast", torch_metrics)
    assert jax_metrics["kl"] > 1e-5, "products multiplied float32 numbers"
    within(jax_metrics["kl"] / torch_metrics["kl"], AUTOCAST_KL_RATIO, "KL with bfloat16 operands over autocast's")


@pytest.mark.slow
def test_their_gradients_are_nearer_to_the_truth_than_autocasts(bundle, weights_path, texts):
    window = texts[:1, :65]
    module = load_hf(weights_path, dtype=torch.float32)
    _, truth = ladder.jax_gradients(bundle, window, "float64")
    _, ours = ladder.jax_gradients(bundle, window, "float32", operands="bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        _, theirs = ladder.torch_gradients(module, window)
    jax_metrics, torch_metrics = (metrics.gradient_errors(backend, truth) for backend in (ours, theirs))
    ratios = {name: jax_metrics[name] / torch_metrics[name] for name in torch_metrics}
    print(
        "median", np.median(list(ratios.values())), "worst", max(ratios, key=ratios.__getitem__), max(ratios.values())
    )
    assert min(jax_metrics.values()) > 1e-5, "products multiplied float32 numbers"
    within(float(np.median(list(ratios.values()))), AUTOCAST_GRADIENT_RATIO, "gradient errors over autocast's, median")
