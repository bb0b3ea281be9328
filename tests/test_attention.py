"""Every way to attend gives the same numbers as the plain one it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax import attention as attention_module
from smollm_jax.attention import KVCache, attention, cached, packed
from smollm_jax.errors import UsageError

# float32 sums in another order: a few roundings of values near 1.
CLOSE = {"atol": 2e-5}


def draw(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def reference(q, k, v, allowed):
    """Attention written out in float64, one head at a time: query head i reads KV head i // (N / K)."""
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for head in range(q.shape[2]):
            group = head // (q.shape[2] // k.shape[2])
            scores = q[b, :, head].astype(np.float64) @ k[b, :, group].T / np.sqrt(q.shape[3])
            scores = np.where(allowed[b], scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, head] = weights / weights.sum(-1, keepdims=True) @ v[b, :, group]
    return out


def test_attention_is_the_formula_written_out():
    q, k, v = draw(2, 9, 6, 16), draw(2, 9, 2, 16), draw(2, 9, 2, 16) + 1
    allowed = np.broadcast_to(np.tri(9, dtype=bool), (2, 9, 9))
    out = attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), is_causal=True)
    np.testing.assert_allclose(out, reference(q, k, v, allowed), **CLOSE)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_long_text_attends_in_blocks_to_the_same_values_and_gradients(monkeypatch, dtype):
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", 32)
    T = 600  # spans of 3 blocks of 32, the last span of 24 queries
    q, k, v, weight = (draw(1, T, heads, 16).astype(dtype) for heads in (6, 2, 2, 6))

    def total(q, k, v):
        return jnp.sum(attention(q, k, v, is_causal=True) * weight)

    with jax.enable_x64(dtype == np.float64):
        blocks = jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)
        buffers = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, v).compile().as_text()
        monkeypatch.setattr(attention_module, "QUERY_BLOCK", T)
        whole = jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)
        dense = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, v).compile().as_text()
    for a, b in zip(*(map(np.asarray, jax.tree.leaves(x)) for x in (blocks, whole)), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a / scale, b / scale, atol=1e-14 if dtype == np.float64 else 2e-6)
    assert f"{T},{T}]" in dense
    assert f"{T},{T}]" not in buffers, "the compiled program holds T x T scores"


def test_packed_attention_is_the_formula_with_the_segments_mask():
    q, k, v = draw(2, 9, 6, 16), draw(2, 9, 2, 16), draw(2, 9, 2, 16) + 1
    segments = np.array([[0, 0, 0, 1, 1, 2, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 0]])
    allowed = np.tri(9, dtype=bool) & (segments[:, :, None] == segments[:, None, :])
    out, _ = packed(jnp.asarray(segments))(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), None)
    np.testing.assert_allclose(out, reference(q, k, v, allowed), **CLOSE)


def test_packed_documents_do_not_see_each_other(tiny_model):
    first, second = np.arange(10) * 37, np.arange(14) * 53 + 5
    together = jnp.asarray(np.concatenate([first, second])[None])
    segments = jnp.asarray([[0] * 10 + [1] * 14])
    positions = jnp.asarray([[*range(10), *range(14)]])
    logits = tiny_model(together, attend=packed(segments), positions=positions)
    np.testing.assert_allclose(logits[:, :10], tiny_model(jnp.asarray(first[None])), **CLOSE)
    np.testing.assert_allclose(logits[:, 10:], tiny_model(jnp.asarray(second[None])), **CLOSE)


def test_packed_documents_are_refused_where_they_would_be_wrong():
    with pytest.raises(UsageError, match="cudnn"):
        packed(jnp.zeros((1, 4), int), implementation="cudnn")


@pytest.mark.parametrize("chunks", [[24], [1] * 24, [7, 1, 16]])
def test_prefill_in_chunks_equals_at_once(tiny_model, tiny, chunks):
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 1000, (2, 24)))
    cache, pieces, done = KVCache.empty(tiny, 2, 40, jnp.float32), [], 0
    for size in chunks:
        positions = jnp.arange(done, done + size)[None]
        hidden, cache = tiny_model.hidden_states(
            tokens[:, done : done + size],
            positions=positions,
            attend=cached(jnp.zeros(2, jnp.int32)),
            memory=cache,
        )
        cache, done = cache.advance(size), done + size
        pieces.append(tiny_model.logits(hidden))
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), tiny_model(tokens), **CLOSE)


def test_left_padding_is_never_attended(tiny_model, tiny):
    text = np.random.default_rng(4).integers(0, 1000, 9)
    padded = np.stack([[*[padding] * 7, *text] for padding in (0, 999)])
    start = jnp.asarray([7, 7], jnp.int32)
    positions = jnp.maximum(jnp.arange(16) - start[:, None], 0)
    hidden, _ = tiny_model.hidden_states(
        jnp.asarray(padded),
        positions=positions,
        attend=cached(start),
        memory=KVCache.empty(tiny, 2, 16, jnp.float32),
    )
    logits = tiny_model.logits(hidden)[:, 7:]
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_allclose(logits[:1], tiny_model(jnp.asarray(text[None])), **CLOSE)
