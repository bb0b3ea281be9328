"""The chunked loss equals the dense one, in value and gradient, and never holds all logits."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.model.cross_entropy import linear_cross_entropy, linear_log_probs, online_logsumexp


def dense(hidden, head, targets):
    logits = hidden @ head.T
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
    return jnp.where(targets >= 0, jax.nn.logsumexp(logits, axis=1) - chosen, 0).sum()


FAST = [
    (10, "a whole chunk", "cpu"),
    (10, "some", "gpu"),
    (37, "all", "cpu"),
    (1, "none", "gpu"),
    (4096, "some", "cpu"),
]
ALL = itertools.product([1, 10, 37, 4096], ["none", "some", "a whole chunk", "all"], ["cpu", "gpu"])


@pytest.mark.parametrize(
    ("chunk_tokens", "masked", "backend"),  # the backend whose form of the sum it is
    [*FAST, *(pytest.param(*other, marks=pytest.mark.slow) for other in ALL if other not in FAST)],
)
def test_it_equals_the_dense_loss_in_float64(chunk_tokens, masked, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        hidden, head = jnp.asarray(draw.normal(size=(37, 16))), jnp.asarray(draw.normal(size=(101, 16)))
        targets = draw.integers(0, 101, 37)
        cut = {"none": [], "some": [0, 5, 36], "a whole chunk": range(10, 20), "all": range(37)}[masked]
        targets[list(cut)] = -1
        targets = jnp.asarray(targets)

        def scaled(loss):  # a cotangent other than 1
            return jax.value_and_grad(lambda h, w: 0.3 * loss(h, w), argnums=(0, 1))(hidden, head)

        value, gradients = scaled(lambda h, w: linear_cross_entropy(h, w, targets, chunk_tokens))
        expected, expected_gradients = scaled(lambda h, w: dense(h, w, targets))
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)
        for actual, expected_gradient in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(actual, expected_gradient, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(
            linear_cross_entropy(hidden, head, targets, chunk_tokens), expected / 0.3, rtol=1e-12
        )


def test_the_heads_gradient_is_summed_in_float32_when_products_are_bfloat16():
    draw = np.random.default_rng(1)
    hidden = jnp.asarray(draw.normal(size=(2048, 32)), jnp.bfloat16)
    head = jnp.asarray(draw.normal(size=(64, 32)), jnp.float32)
    targets = jnp.zeros(2048, jnp.int32)  # one row collects every token
    gradient = jax.grad(lambda w: linear_cross_entropy(hidden, w, targets, 128))(head)
    assert gradient.dtype == jnp.float32
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
    exact = jax.grad(lambda w: dense(hidden.astype(jnp.float32), w, targets))(rounded)
    # Each token's error is rounded to bfloat16 (2**-9 relative) and these average out; a bfloat16 sum would not.
    assert float(jnp.abs(gradient - exact).max() / jnp.abs(exact).max()) < 2e-3


def test_the_mean_over_any_number_of_tokens_is_scaled_right_in_bfloat16():
    """1/49 is not exact in bfloat16: rounded before the multiplication, it would bias every gradient."""
    draw = np.random.default_rng(2)
    hidden, head = jnp.asarray(draw.normal(size=(48, 32)), jnp.bfloat16), jnp.asarray(draw.normal(size=(64, 32)))
    targets = jnp.asarray(draw.integers(0, 64, 48))
    mean = jax.grad(lambda h: linear_cross_entropy(h, head, targets) / 49)(hidden).astype(jnp.float32)
    whole = jax.grad(lambda h: linear_cross_entropy(h, head, targets))(hidden).astype(jnp.float32)
    assert abs(float((mean * whole).sum() / (whole * whole).sum()) * 49 - 1) < 5e-4


def test_the_compiled_step_holds_no_more_than_one_chunk_of_logits():
    M, D, V, chunk = 4096, 64, 49_152, 512
    shapes = jax.ShapeDtypeStruct((M, D), jnp.bfloat16), jax.ShapeDtypeStruct((V, D), jnp.float32)
    targets = jax.ShapeDtypeStruct((M,), jnp.int32)
    step = jax.jit(jax.value_and_grad(lambda h, w, t: linear_cross_entropy(h, w, t, chunk), argnums=(0, 1)))
    text = step.lower(*shapes, targets).compile().as_text()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) == chunk * V


def test_value_and_gradients_take_three_products_not_four():
    shapes = jax.ShapeDtypeStruct((40, 8), jnp.float32), jax.ShapeDtypeStruct((50, 8), jnp.float32)
    targets = jax.ShapeDtypeStruct((40,), jnp.int32)
    step = jax.jit(jax.value_and_grad(lambda h, w, t: linear_cross_entropy(h, w, t, 10), argnums=(0, 1)))
    assert step.lower(*shapes, targets).as_text().count("stablehlo.dot_general") == 3


def test_a_sum_in_one_pass_holds_numbers_of_any_size():
    x = np.random.default_rng(0).normal(size=(6, 5000)).astype(np.float32) * np.float32(
        [[1e-6], [1], [30], [1e4], [1e30], [0]]
    )
    largest = x.max(axis=1, keepdims=True).astype(float)
    expected = (largest + np.log(np.exp(x.astype(float) - largest).sum(axis=1, keepdims=True)))[:, 0]
    np.testing.assert_allclose(online_logsumexp(jnp.asarray(x), axis=-1), expected, rtol=3e-7)
    assert jnp.isnan(online_logsumexp(jnp.array([[1.0, jnp.nan, 2.0]]), axis=-1)).all()


@pytest.mark.parametrize("chunk_tokens", [10, 4096])
@pytest.mark.parametrize("masked", ["none", "some", "all"])
def test_log_probs_of_tokens_and_their_gradients_are_the_dense_ones(chunk_tokens, masked):
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        hidden, head = jnp.asarray(draw.normal(size=(37, 16))), jnp.asarray(draw.normal(size=(101, 16)))
        targets = draw.integers(0, 101, 37)
        targets[{"none": [], "some": [0, 5, 6, 7, 36], "all": list(range(37))}[masked]] = -1
        weights, targets = jnp.asarray(draw.normal(size=37)), jnp.asarray(targets)

        def dense_log_probs(hidden, head):
            logs = jax.nn.log_softmax(hidden @ head.T)
            return jnp.where(targets >= 0, logs[jnp.arange(37), jnp.maximum(targets, 0)], 0)

        chunked = lambda h, w: linear_log_probs(h, w, targets, chunk_tokens)  # noqa: E731
        np.testing.assert_allclose(chunked(hidden, head), dense_log_probs(hidden, head), rtol=1e-12, atol=1e-12)
        gradients = [
            jax.grad(lambda h, w, f=f: (f(h, w) ** 2 * weights).sum(), (0, 1))(hidden, head)
            for f in (chunked, dense_log_probs)
        ]
        for ours, theirs in zip(*gradients, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11)
