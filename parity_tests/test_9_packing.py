"""Rung 9: on the real weights, packed documents give the same results as separate ones, and positions are relative."""

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax.model.attention import packed
from smollm_parity.tolerances import PACKED_LOGITS, within


@jax.jit
def packed_logits(model, tokens, segments, positions):
    return model(tokens, attend=packed(segments), positions=positions)


def test_packed_documents_equal_separate_ones(jax_model, texts):
    lengths = [128, 5, 1, 77, 100]
    documents = [text[:length] for text, length in zip(texts, lengths, strict=False)]
    tokens = jnp.asarray(np.concatenate(documents)[None])
    segments = jnp.asarray(np.repeat(np.arange(len(lengths)), lengths)[None])
    positions = jnp.asarray(np.concatenate([np.arange(length) for length in lengths])[None])
    together = np.asarray(packed_logits(jax_model, tokens, segments, positions))[0]
    forward = jax.jit(lambda model, tokens: model(tokens))
    apart = np.concatenate([np.asarray(forward(jax_model, jnp.asarray(d[None])))[0] for d in documents])
    within(np.abs(together - apart).max() / np.abs(apart).max(), PACKED_LOGITS, "packed against separate documents")
    unmasked = np.asarray(packed_logits(jax_model, tokens, segments * 0, positions))[0]
    assert np.abs(unmasked - apart).max() > 1, "documents would not have influenced each other anyway"
