"""On the real weights and real text, JAX, the twin and Hugging Face compute the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from parity_tests.tolerances import ARGMAX_MARGIN, LOGITS_FLOAT32


@pytest.fixture(scope="module")
def hf_logits(hf, real_tokens):
    cache = {}

    def logits(length):
        if length not in cache:
            with torch.inference_mode():
                cache[length] = hf(torch.tensor(real_tokens[:, :length])).logits.numpy()
        return cache[length]

    return logits


def jax_logits(model, tokens):
    return np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens)))


def twin_logits(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor(tokens)).numpy()


@pytest.mark.parametrize("length", [600, 2048])
@pytest.mark.parametrize("side", ["jax", "twin"])
def test_float32_logits_equal_hugging_faces_at_every_position(
    side, length, hf_logits, jax_model, twin, real_tokens, record_property
):
    tokens = real_tokens[:, :length]
    ours = jax_logits(jax_model, tokens) if side == "jax" else twin_logits(twin, tokens)
    theirs = hf_logits(length)
    assert ours.shape == theirs.shape == (1, length, 49_152)
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    best = np.sort(theirs, axis=-1)
    clear = best[..., -1] - best[..., -2] > ARGMAX_MARGIN
    print(f"{side}, T={length}: largest difference {error:.1e} of the largest logit; {clear.mean():.1%} clear margins")
    assert error < LOGITS_FLOAT32
    assert (ours.argmax(-1) == theirs.argmax(-1))[clear].all()
    assert clear.mean() > 0.99


def test_the_model_knows_the_capital_of_france(jax_model, tokenizer):
    logits = jax_logits(jax_model, np.array([tokenizer.encode("The capital of France is")]))
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
