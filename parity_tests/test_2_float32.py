"""Rung 2: in float32 JAX is as close to the truth as transformers is, layer by layer, and they agree at the logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from smollm_parity import ladder, metrics
from smollm_parity.tolerances import ARGMAX_MARGIN, FLOAT32_LOGITS, FLOAT32_MAX_RATIO, FLOAT32_RMS_RATIO, within


@pytest.mark.parametrize("place", ["first token", "other tokens"])
def test_no_layer_is_further_from_the_truth_than_transformers(place, bundle, hf, texts, texts_truth):
    """The first token of a text, the attention sink, has activations of 28,000 and all the largest errors: a text has
    one of them, a lottery ticket, so that they are measured on their own, 256 of them."""
    if place == "first token":
        tokens, skip = np.unique(texts)[:256, None].astype(np.int32), 0
        assert len(tokens) == 256
        truth = ladder.jax_stream(bundle, tokens, "float64")
    else:
        tokens, skip, truth = texts, 1, texts_truth
    ours, theirs = ladder.jax_stream(bundle, tokens, "float32"), ladder.torch_stream(hf, tokens)
    (rms, largest), (hf_rms, hf_largest) = (
        metrics.layer_errors(backend[0][:, :, skip:], truth[0][:, :, skip:]) for backend in (ours, theirs)
    )
    assert (rms > 0).all(), "the float32 model was computed in float64"
    within((rms / hf_rms).max(), FLOAT32_RMS_RATIO, f"float32 RMS error over transformers', worst layer, {place}")
    within((largest / hf_largest).max(), FLOAT32_MAX_RATIO, f"float32 largest error, worst layer, {place}")
    (rms, largest), (hf_rms, hf_largest) = (
        metrics.logit_errors(backend[1][:, skip:], truth[1][:, skip:]) for backend in (ours, theirs)
    )
    within(rms / hf_rms, FLOAT32_RMS_RATIO, f"float32 RMS error over transformers', logits, {place}")
    within(largest / hf_largest, FLOAT32_MAX_RATIO, f"float32 largest error, logits, {place}")


@pytest.fixture(scope="module")
def hf_logits(hf, real_tokens):
    """Of the first `length` tokens, once for both backends."""

    @functools.cache
    def logits(length: int) -> np.ndarray:
        with torch.inference_mode():
            return hf(torch.tensor(real_tokens[:, :length])).logits.numpy()

    return logits


def jax_logits(model, tokens):
    return np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens)))


def twin_logits(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor(tokens)).numpy()


@pytest.mark.parametrize("length", [600, pytest.param(2048, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["jax", "twin"])
def test_logits_equal_transformers_at_every_position(backend, length, hf_logits, jax_model, twin, real_tokens):
    """At default precision, as a user calls it."""
    tokens, theirs = real_tokens[:, :length], hf_logits(length)
    ours = jax_logits(jax_model, tokens) if backend == "jax" else twin_logits(twin, tokens)
    assert ours.shape == theirs.shape == (1, length, 49_152)
    within(np.abs(ours - theirs).max() / np.abs(theirs).max(), FLOAT32_LOGITS, f"float32 logits, {backend}, T={length}")
    best = np.sort(theirs, axis=-1)
    clear = best[..., -1] - best[..., -2] > ARGMAX_MARGIN
    assert (ours.argmax(-1) == theirs.argmax(-1))[clear].all()
    assert clear.mean() > 0.99


def test_the_model_knows_the_capital_of_france(jax_model, tokenizer):
    logits = jax_logits(jax_model, np.array([tokenizer.encode("The capital of France is")]))
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
