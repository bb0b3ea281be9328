"""bfloat16 on a CPU: matmuls of rounded operands, everything else in float32, and when a run uses it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.config import preset
from smollm_jax.model.cross_entropy import linear_cross_entropy
from smollm_jax.model.flash_attention import block_attention
from smollm_jax.model.ops import linear
from smollm_jax.model.precision import activation_and_operand_dtypes
from smollm_jax.runs.pytree import flatten
from smollm_jax.training import setup as training_setup
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.flags import TrainingFlags
from smollm_jax.training.loss import total_loss
from smollm_jax.training.state import init_model

ROUNDED = 2e-6  # of sums of a few hundred terms in float32, relative to the largest
ASSETS = Path(__file__).parents[2] / "assets"
TINY = preset("tiny")


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def rounded(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def apart(a, b):
    return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()


def test_a_product_multiplies_rounded_numbers_and_rounds_nothing_else():
    x, w, gradient = numbers(0, 2, 5, 96), numbers(1, 96, 64), numbers(2, 2, 5, 64)
    out, pull = jax.vjp(lambda x, w: linear(x, w, operands="bfloat16"), jnp.asarray(x), jnp.asarray(w))
    of_x, of_w = pull(jnp.asarray(gradient))
    assert {y.dtype for y in (out, of_x, of_w)} == {jnp.dtype("float32")}
    assert apart(out, rounded(x) @ rounded(w)) < ROUNDED
    assert apart(of_x, rounded(gradient) @ rounded(w).T) < ROUNDED
    assert apart(of_w, np.einsum("bti,bto->io", rounded(x), rounded(gradient))) < ROUNDED
    assert apart(out, x.astype(np.float64) @ w) > 1e-3, "nothing was rounded"


def test_the_gradient_of_every_parameter_is_a_float32_sum():
    """No gradient is rounded to bfloat16 on the way, as autocast's are."""
    model, tokens = init_model(TINY, 0), jnp.asarray(np.random.default_rng(0).integers(0, TINY.vocab_size, (1, 33)))
    gradient = jax.jit(jax.grad(total_loss), static_argnums=2)(
        model, tokens, ExecutionConfig("float32", operands="bfloat16")
    )
    for name, array in flatten(gradient).items():
        nonzero = np.asarray(array)[np.asarray(array) != 0]
        assert nonzero.dtype == np.float32
        assert (nonzero != rounded(nonzero)).mean() > 0.9, name


def test_norms_keep_their_scales():
    """1 + 2**-12 is not exact in bfloat16."""
    model, tokens = init_model(TINY, 0), np.arange(24)[None]
    logits = []
    for scale in (1, 1 + 2**-12):
        model.layers.input_layernorm[...] = jnp.full_like(model.layers.input_layernorm[...], scale)
        logits.append(np.asarray(model(tokens, dtype="float32", operands="bfloat16")))
    assert (logits[0] != logits[1]).mean() > 0.9


def test_the_loss_and_its_gradients_take_rounded_numbers_and_sum_in_float32():
    hidden, head, targets = numbers(0, 40, 32), numbers(1, 300, 32), np.random.default_rng(2).integers(0, 300, 40)
    both = jax.value_and_grad(lambda h, w: linear_cross_entropy(h, w, jnp.asarray(targets), 16, "bfloat16"), (0, 1))
    loss, (of_hidden, of_head) = both(jnp.asarray(hidden), jnp.asarray(head))
    logits = rounded(hidden) @ rounded(head).T
    logits -= logits.max(axis=1, keepdims=True)
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    error = rounded(probability - np.eye(300)[targets])
    assert apart(loss, -np.log(probability[np.arange(40), targets]).sum()) < ROUNDED
    # An error that float32 rounds to another bfloat16 than float64 does is 2**-8 of itself off.
    assert apart(of_hidden, error @ rounded(head)) < 1e-4
    assert apart(of_head, error.T @ rounded(hidden)) < 1e-4
    assert (of_hidden.dtype, of_head.dtype) == (jnp.float32, jnp.float32)
    assert apart(of_head, error.T @ hidden.astype(np.float64)) > 5e-4, "hidden states were not rounded"


@pytest.mark.parametrize("segments", [None, np.arange(40)[None] // 15])
def test_attention_multiplies_rounded_numbers_and_gives_float32(segments):
    q, k, v, gradient = (numbers(i, 1, 40, heads, 16) for i, heads in enumerate((6, 2, 2, 6)))
    ids = None if segments is None else jnp.asarray(segments)

    def values_and_gradients(q, k, v, gradient, **options):
        out, pull = jax.vjp(lambda q, k, v: block_attention(q, k, v, ids, 16, **options), q, k, v)
        return out, *pull(gradient)

    results = values_and_gradients(*map(jnp.asarray, (q, k, v, gradient)), operands="bfloat16")
    with jax.enable_x64(True):
        exact = values_and_gradients(*(jnp.asarray(rounded(x)) for x in (q, k, v, gradient)))
        unrounded = values_and_gradients(*(jnp.asarray(x, jnp.float64) for x in (q, k, v, gradient)))
    for actual, expected, float32 in zip(results, exact, unrounded, strict=True):
        assert actual.dtype == jnp.float32
        assert apart(actual, np.asarray(expected)) < 6e-3, "the weights alone are rounded besides: 2**-9 each"
        assert apart(actual, np.asarray(float32)) > 1e-3, "nothing was rounded"


@pytest.mark.parametrize(
    ("dtype", "platform", "both"),
    [
        ("bfloat16", "cpu", ("float32", "bfloat16")),
        ("bfloat16", "gpu", ("bfloat16", "bfloat16")),
        ("float32", "cpu", ("float32", "float32")),
        ("float32", "gpu", ("float32", "float32")),
    ],
)
def test_only_a_cpu_keeps_float32_between_products(dtype, platform, both):
    assert activation_and_operand_dtypes(dtype, platform) == both


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        ({}, None),
        ({"recipe": "demo"}, None),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"recipe": "gpu-demo", "batch_size": 1}, "bfloat16"),
    ],
)
def test_a_cpu_that_multiplies_bfloat16_fast_trains_in_it_unless_told_otherwise(
    monkeypatch, tmp_path, fast, flags, chosen
):
    monkeypatch.setattr("smollm_jax.runtime.cpu.has_fast_bfloat16", lambda: fast)
    training_flags = dataclasses.replace(TrainingFlags(tokenizer=ASSETS / "tokenizer", preset="smollm2-135m"), **flags)
    setup = training_setup.set_up(training_flags, tmp_path, None)
    expected = chosen or ("bfloat16" if fast else "float32")
    assert setup.start.recipe.dtype == setup.execution.operands == expected
    assert setup.execution.dtype == "float32", "on a CPU"
