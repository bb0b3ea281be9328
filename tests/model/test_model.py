"""The model's own promises: shapes, init, precision, and that no config field is decoration."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.config import preset
from smollm_jax.errors import UsageError
from smollm_jax.model import cost
from smollm_jax.model.ops import fused_swiglu, rms_norm, rope_cos_sin, swiglu
from smollm_jax.model.smollm import SmolLM
from smollm_jax.runs.pytree import flatten


def tokens(config, length=24):
    return jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, length)))


@pytest.mark.parametrize("name", ["smollm2-135m", "smollm2-360m", "smollm2-1.7b", "tiny"])
def test_the_parameters_are_as_many_as_the_arithmetic_says(name):
    model = jax.eval_shape(lambda: SmolLM(preset(name), key=jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == cost.count_parameters(preset(name))


def test_the_init_is_the_recipes(tiny):
    parameters = flatten(SmolLM(dataclasses.replace(tiny, num_hidden_layers=8), key=jax.random.key(1)))
    for name, value in parameters.items():
        if name.endswith("norm"):
            assert (value == 1).all(), name
        else:
            residual = name.endswith(("o_proj", "down_proj"))
            std = tiny.initializer_range / (16**0.5 if residual else 1)
            assert float(value.std()) == pytest.approx(std, rel=0.03), name
    layers = parameters["layers.mlp.up_proj"]
    assert len({float(layer.sum()) for layer in layers}) == 8, "layers drew the same numbers"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_float32_and_close_in_every_compute_dtype(tiny_model, tiny, dtype):
    x = tokens(tiny)
    logits = tiny_model(x, dtype=dtype)
    assert logits.shape == (2, 24, tiny.vocab_size)
    assert logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits: the relative RMS error is a few 2**-9 after 3 layers, 0 when computed in float32.
    exact = tiny_model(x)
    error = float(jnp.sqrt(jnp.mean((logits - exact) ** 2) / jnp.mean(exact**2)))
    assert error < 0.02
    assert (error > 0) == (dtype == jnp.bfloat16)


def test_float64_is_computed_in_float64(tiny):
    with jax.enable_x64(True):
        model = jax.tree.map(lambda x: x.astype(jnp.float64), SmolLM(tiny, key=jax.random.key(0)))
        x = tokens(tiny, 8)
        base = model(x)
        assert base.dtype == jnp.float64
        # A change far below float32's resolution must show in the logits, through every softmax and norm.
        model.layers.self_attn.v_proj[...] = model.layers.self_attn.v_proj[...] * (1 + 1e-12)
        assert 1e-16 < float(jnp.abs(model(x) - base).max()) < 1e-10


@pytest.mark.parametrize("kind", [list, np.int64, np.uint16], ids=["lists", "int64", "uint16"])
def test_the_model_takes_lists_and_numpy_arrays(tiny_model, kind):
    ids = [[5, 0, 95], [1, 2, 3]]
    logits = tiny_model(ids if kind is list else np.array(ids, kind))
    assert jnp.array_equal(logits, tiny_model(jnp.array(ids)))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, -1]], "outside the vocabulary"),
        (np.array([[2**32 + 5]]), "outside the vocabulary"),
        ([1, 2], r"\[batch, length\], got int64 \[2\]"),
        ([[1, 2], [3]], "rows of equal length"),
        ([[1.5]], "integers"),
        ([[True]], "integers"),
        (np.zeros((1, 0), int), "at least one"),
        (jnp.array([[1.5]]), "integers"),
        (None, "integers"),
    ],
)
def test_tokens_that_are_none_are_refused_in_one_line(tiny_model, tokens, message):
    with pytest.raises(UsageError, match=message):
        tiny_model(tokens)


def test_a_token_outside_the_vocabulary_gives_nan_not_a_neighbour(tiny_model, tiny):
    for wrong in (tiny.vocab_size, -1):
        assert jnp.isnan(tiny_model(jnp.array([[1, wrong, 2]]))[0, 1]).all()
    assert jnp.isfinite(tiny_model(jnp.array([[1, tiny.vocab_size - 1, 2]]))).all()


def test_the_future_does_not_change_the_past(tiny_model, tiny):
    x = tokens(tiny)
    changed = x.at[:, 12:].set(7)
    np.testing.assert_array_equal(tiny_model(x)[:, :12], tiny_model(changed)[:, :12])


def test_only_relative_positions_count(tiny_model, tiny):
    x = tokens(tiny)
    shifted = tiny_model(x, positions=jnp.arange(24)[None] + 100)
    np.testing.assert_allclose(shifted, tiny_model(x), atol=2e-5)


def gradients(model, x, **options):
    loss = jax.jit(jax.grad(lambda model, x: jnp.square(model.hidden_states(x, **options)[0]).mean()))
    return jax.tree.leaves(loss(model, x))


@pytest.fixture(scope="module")
def default_gradients(tiny_model, tiny):
    return gradients(tiny_model, tokens(tiny))


@pytest.mark.parametrize("options", [{"remat": "full"}, {"remat": "swiglu"}, {"remat": "none"}, {"unroll": 3}])
def test_remat_and_unroll_change_nothing_but_the_schedule(tiny_model, tiny, default_gradients, options):
    for a, b in zip(default_gradients, gradients(tiny_model, tokens(tiny), **options), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(a).max()))


def test_rotary_angles_are_not_rounded_to_bfloat16(tiny):
    """bfloat16 would take position 4,099 for 4,096; of cos and sin only the result is rounded."""
    positions = np.array([[1, 4099, 8191]])
    angle = positions[..., None, None] * np.array(tiny.rotary_frequencies)
    for ours, exact in zip(rope_cos_sin(jnp.asarray(positions), tiny, jnp.bfloat16), (np.cos, np.sin), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact(angle), rtol=0, atol=2**-8)


def test_rms_norm_rounds_before_it_scales():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 96)), jnp.bfloat16)
    scale = jnp.asarray(np.random.default_rng(1).normal(size=96), jnp.bfloat16)
    wide = np.asarray(x, np.float32)
    normed = jnp.asarray(wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5), jnp.bfloat16)
    assert (rms_norm(x, scale, 1e-5) == normed * scale).mean() > 0.999  # one rounding tie may fall the other way


def plain_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5) * scale


# Each with what jax differentiates by itself, and its inputs' shapes: 4,096 tokens of 24 channels.
WRITTEN_OUT = {
    "norm": (lambda x, scale: rms_norm(x, scale, 1e-5), plain_norm, [(2, 2048, 24), (24,)]),
    "swiglu": (fused_swiglu, lambda y: swiglu(*jnp.split(y, 2, axis=-1)), [(2, 2048, 24)]),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_gradients_written_out_are_those_of_the_function(name):
    ours, plain, shapes = WRITTEN_OUT[name]
    draw = np.random.default_rng(0)
    with jax.enable_x64(True):
        inputs = [jnp.asarray(draw.normal(size=shape)) for shape in shapes]
        inputs = [x.astype(jnp.bfloat16).astype(float) for x in inputs]  # numbers that bfloat16 holds, too
        out, pull = jax.vjp(plain, *inputs)
        gradient = jnp.asarray(draw.normal(size=out.shape) + 1).astype(jnp.bfloat16).astype(float)
        expected = pull(gradient)
        for actual, exact in zip(jax.vjp(ours, *inputs)[1](gradient), expected, strict=True):
            np.testing.assert_allclose(actual, exact, rtol=1e-12, atol=1e-12)
        narrow = jax.vjp(ours, *(x.astype(jnp.bfloat16) for x in inputs))[1](gradient.astype(jnp.bfloat16))
        for actual, exact in zip(narrow, expected, strict=True):
            assert actual.dtype == jnp.bfloat16
            # Rounded once, to 8 bits: RMS 0.9 of 2**-9. By jax's own rules, rounded at every step and the norm's scale
            # summed in bfloat16: swiglu 1.8, scale 6.5.
            error = jnp.sqrt(jnp.mean((actual.astype(float) - exact) ** 2) / jnp.mean(exact**2))
            assert float(error) < 2**-9


CHANGES = {
    "vocab_size": 49_000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-2,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
# Read outside the forward pass: generation's context and stops, training's document ends, exports.
NOT_IN_THE_FORWARD_PASS = {"max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}


def test_every_config_field_is_accounted_for(tiny):
    assert CHANGES.keys() | NOT_IN_THE_FORWARD_PASS == {field.name for field in dataclasses.fields(tiny)}


@pytest.mark.parametrize("field", CHANGES)
def test_changing_any_config_field_changes_the_logits(tiny_model, tiny, field):
    changed = SmolLM(dataclasses.replace(tiny, **{field: CHANGES[field]}), key=jax.random.key(0))
    x = tokens(tiny) % 49_000
    before, after = tiny_model(x), changed(x)
    assert before.shape != after.shape or not np.allclose(before, after, atol=1e-3)


def test_an_untied_head_is_its_own_parameter(tiny):
    model = SmolLM(dataclasses.replace(tiny, tie_word_embeddings=False), key=jax.random.key(0))
    assert set(flatten(model)) - set(flatten(SmolLM(tiny, key=jax.random.key(0)))) == {"lm_head"}


def test_impossible_heads_are_refused(tiny):
    with pytest.raises(UsageError, match="num_key_value_heads"):
        dataclasses.replace(tiny, num_key_value_heads=4)
