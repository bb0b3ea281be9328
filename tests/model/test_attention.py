"""Every attention implementation gives the results of plain masked attention."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.model.attention import KVCache, attention, cached, causal, packed
from smollm_jax.model.flash_attention import block_attention

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
    inputs = [jnp.asarray(x) for x in (q, k, v)]
    np.testing.assert_allclose(attention(*inputs, jnp.asarray(allowed)[:, None]), reference(q, k, v, allowed), **CLOSE)
    np.testing.assert_allclose(causal()(*inputs, None)[0], reference(q, k, v, allowed), **CLOSE)


FAST = [(1, None, np.float64, "one text"), (70, 32, np.float32, "one text"), (70, 32, np.float64, "packed")]
FAST += [(40, 512, np.float32, "packed")]
SIZES, DTYPES, SEGMENTS = [(1, None), (32, 16), (70, 32), (40, 512)], [np.float32, np.float64], ["one text", "packed"]
OTHERS = [(*size, *other) for size, *other in itertools.product(SIZES, DTYPES, SEGMENTS)]


@pytest.mark.parametrize(
    ("T", "block", "dtype", "segments"),
    [*FAST, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS if other not in FAST)],
)
def test_blocks_give_the_values_and_gradients_of_attention_at_once(T, block, dtype, segments):
    q, k, v, weight = (draw(2, T, heads, 16).astype(dtype) for heads in (6, 2, 2, 6))
    rng = np.random.default_rng(T)
    ids = np.sort(rng.integers(0, 5, (2, T)), axis=1) if segments == "packed" else np.zeros((2, T), int)
    mask = jnp.asarray(np.tri(T, dtype=bool) & (ids[:, :, None] == ids[:, None, :]))[:, None]
    segment_ids = jnp.asarray(ids) if segments == "packed" else None

    def of(attend):
        out, backward = jax.vjp(attend, *map(jnp.asarray, (q, k, v)))
        return out, *backward(jnp.asarray(weight))

    with jax.enable_x64(dtype == np.float64):
        ours = jax.jit(lambda: of(lambda q, k, v: block_attention(q, k, v, segment_ids, block)))()
        whole = jax.jit(lambda: of(lambda q, k, v: attention(q, k, v, mask)))()
    for a, b in zip(map(np.asarray, ours), map(np.asarray, whole), strict=True):
        assert a.dtype == dtype
        scale = np.abs(b).max() or 1.0
        np.testing.assert_allclose(a / scale, b / scale, atol=1e-14 if dtype == np.float64 else 2e-6)


def test_bfloat16_blocks_are_as_exact_as_attention_at_once():
    q, k, v = (draw(1, 200, heads, 16) for heads in (6, 2, 2))
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    allowed = np.tri(200, dtype=bool)[None]
    truth = reference(*(np.asarray(x, np.float64) for x in rounded), allowed)

    def error(out):
        assert out.dtype == jnp.bfloat16
        return np.sqrt(np.mean((np.asarray(out, np.float64) - truth) ** 2))

    assert error(block_attention(*rounded)) <= 1.1 * error(attention(*rounded, jnp.asarray(allowed)[:, None]))


def test_the_compiled_step_of_a_long_text_never_holds_scores_of_all_pairs():
    T = 600
    shapes = [jax.ShapeDtypeStruct((1, T, heads, 16), jnp.float32) for heads in (6, 2, 2)]

    def compiled(attend):
        gradient = jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v)), argnums=(0, 1, 2))
        return jax.jit(gradient).lower(*shapes).compile().as_text()

    mask = jnp.tri(T, dtype=bool)[None, None]
    assert f"{T},{T}]" in compiled(lambda q, k, v: attention(q, k, v, mask)), "this test would not see them"
    held = compiled(block_attention)
    assert not any(f"{rows},{columns}]" in held for rows in (T, 768) for columns in (T, 768))


def test_blocks_of_different_documents_are_not_computed():
    """Their keys may be NaN, which a weight of 0 would not remove."""
    segments = jnp.asarray([[0] * 64 + [1] * 64])
    q, k, v = (draw(1, 128, heads, 16) for heads in (6, 2, 2))
    v[:, :64] = np.nan
    out = block_attention(*map(jnp.asarray, (q, k, v)), segments, 64)
    assert np.isnan(out[:, :64]).all()
    assert np.isfinite(out[:, 64:]).all()


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


def test_what_cudnn_is_told_of_packed_documents_is_the_formula(monkeypatch):
    """Everything but the kernel, which XLA's implementation replaces here."""
    theirs, implementations = jax.nn.dot_product_attention, []

    def stand_in(*inputs, implementation, **options):
        implementations.append(implementation)
        return theirs(*inputs, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    q, k, v = draw(2, 9, 6, 16), draw(2, 9, 2, 16), draw(2, 9, 2, 16) + 1
    segments = np.array([[0, 0, 0, 1, 1, 2, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 0]])
    allowed = np.tri(9, dtype=bool) & (segments[:, :, None] == segments[:, None, :])
    out, _ = packed(jnp.asarray(segments), "cudnn")(*map(jnp.asarray, (q, k, v)), None)
    np.testing.assert_allclose(out, reference(q, k, v, allowed), **CLOSE)
    assert implementations == ["cudnn"]


@pytest.mark.parametrize("chunks", [[24], [1] * 24, [7, 1, 16]])
def test_prefill_in_chunks_equals_at_once(tiny_model, tiny, chunks):
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 1000, (2, 24)))
    cache, pieces, done = KVCache.empty(tiny, 2, 40, jnp.float32), [], 0

    @jax.jit
    def forward(model, tokens, positions, cache):
        attend = cached(jnp.zeros(2, jnp.int32))
        hidden, cache = model.hidden_states(tokens, positions=positions, attend=attend, cache=cache)
        return model.logits(hidden), cache.advance(tokens.shape[1])

    for size in chunks:
        positions = jnp.arange(done, done + size)[None]
        logits, cache = forward(tiny_model, tokens[:, done : done + size], positions, cache)
        pieces.append(logits)
        done += size
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
        cache=KVCache.empty(tiny, 2, 16, jnp.float32),
    )
    logits = tiny_model.logits(hidden)[:, 7:]
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_allclose(logits[:1], tiny_model(jnp.asarray(text[None])), **CLOSE)
