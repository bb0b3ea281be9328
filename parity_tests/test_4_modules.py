"""Rung 4: each module on its own equals transformers' and the twin's, on ordinary and adversarial inputs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

import smollm_torch.model as torch_model
import smollm_torch.weights
from smollm_jax import weights
from smollm_jax.config import PRESETS, preset
from smollm_jax.config.hf_config import config_to_hf
from smollm_jax.model.attention import causal
from smollm_jax.model.ops import apply_rope, rms_norm, rope_cos_sin
from smollm_jax.model.smollm import SmolLM
from smollm_parity.ladder import precisely
from smollm_parity.tolerances import MODULE_FLOAT32, MODULE_FLOAT32_HUGE, MODULE_FLOAT64, within

LENGTHS = (1, 7, 512)
INPUTS = {
    "random": lambda draw, shape: draw.normal(size=shape),
    "large": lambda draw, shape: draw.normal(size=shape) * 1e4,
    "tiny": lambda draw, shape: draw.normal(size=shape) * 1e-4,
    "constant": lambda draw, shape: np.full(shape, 0.37),
    "one huge": lambda draw, shape: np.where(np.arange(shape[-1]) == 5, 3000.0, draw.normal(size=shape)),
}
CONFIG = dataclasses.replace(preset("smollm2-135m"), num_hidden_layers=1, vocab_size=64)


@pytest.mark.parametrize("name", PRESETS)
def test_rotary_frequencies_are_transformers_bits(name):
    theirs = LlamaRotaryEmbedding(LlamaConfig(**config_to_hf(PRESETS[name]))).inv_freq
    assert theirs.dtype == torch.float32
    np.testing.assert_array_equal(np.array(PRESETS[name].rotary_frequencies, np.float32), theirs.numpy())


@pytest.fixture(scope="module")
def layer_bundle():
    """One layer of the real width with random weights, and norm weights far from 1."""
    with jax.enable_x64(False):
        bundle = weights.to_bundle(SmolLM(CONFIG, key=jax.random.key(3)))
    draw = np.random.default_rng(0)
    for name, tensor in bundle.tensors.items():
        if "norm" in name:
            bundle.tensors[name] = draw.normal(1, 0.5, tensor.shape).astype(np.float32)
    return bundle


@pytest.fixture(scope="module")
def layers(layer_bundle):
    """The only layer of the bundle, without its leading axis, in either dtype."""
    loaded = {}
    for dtype in ("float32", "float64"):
        with precisely(dtype):
            loaded[dtype] = jax.tree.map(lambda p: p[0], weights.from_bundle(layer_bundle, dtype).layers)
    return loaded


@pytest.fixture(scope="module")
def twin(layer_bundle):
    """The twin's layer in float64."""
    return smollm_torch.weights.from_bundle(layer_bundle, torch.float64).model.layers[0]


norm = jax.jit(functools.partial(rms_norm, eps=CONFIG.rms_norm_eps))
mlp = jax.jit(lambda module, x: module(x))
attend = jax.jit(lambda module, x, cos, sin: module(x, cos, sin, causal(), None)[0])


def draw_input(kind, length, dtype, width=CONFIG.hidden_size):
    return INPUTS[kind](np.random.default_rng(length), (2, length, width)).astype(np.float32).astype(dtype)


def relative(ours, theirs):
    theirs = theirs.detach().numpy()
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_norm(kind, length, layer_bundle):
    scale = layer_bundle.tensors["model.norm.weight"]
    x = draw_input(kind, length, np.float32)
    theirs = LlamaRMSNorm(CONFIG.hidden_size, CONFIG.rms_norm_eps)
    theirs.weight.data = torch.tensor(scale)
    within(relative(norm(jnp.asarray(x), jnp.asarray(scale)), theirs(torch.tensor(x))), MODULE_FLOAT32, "norm")
    with precisely("float64"):
        twin = torch_model.RMSNorm(CONFIG).double()
        twin.weight.data = torch.tensor(scale).double()
        ours = norm(jnp.asarray(x, float), jnp.asarray(scale, float))
        within(relative(ours, twin(torch.tensor(x).double())), MODULE_FLOAT64, "norm, float64")


@pytest.mark.parametrize("offset", [0, 1, 600, 2047, 8191])
def test_rotary(offset):
    positions = np.arange(max(0, offset - 6), offset + 1)[None]
    x = np.random.default_rng(1).normal(size=(1, positions.size, 3, 64)).astype(np.float32)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**config_to_hf(CONFIG)))
    cos, sin = theirs(torch.tensor(x), torch.tensor(positions))
    expected = apply_rotary_pos_emb(torch.tensor(x).transpose(1, 2), torch.tensor(x).transpose(1, 2), cos, sin)[0]
    ours = apply_rope(jnp.asarray(x), *rope_cos_sin(jnp.asarray(positions), CONFIG, jnp.float32))
    within(relative(ours, expected.transpose(1, 2)), MODULE_FLOAT32, f"rotary at {offset}")
    # The angle itself: float32 position x float32 frequency, one rounding.
    exact = positions[0, -1] * np.array(CONFIG.rotary_frequencies)
    rounding = max(float(exact.max()) * 2**-24, 1e-6)
    cos, sin = rope_cos_sin(jnp.asarray(positions), CONFIG, jnp.float32)
    within(np.abs(np.asarray(cos)[0, -1, 0] - np.cos(exact)).max() / rounding, 1.5, f"cos at {offset}, in roundings")
    with precisely("float64"):
        ours = apply_rope(jnp.asarray(x, float), *rope_cos_sin(jnp.asarray(positions), CONFIG, jnp.float64))
        angles = torch_model.rope_cos_sin(torch.tensor(positions), CONFIG, torch.float64)
        twin = torch_model.apply_rope(torch.tensor(x).double().transpose(1, 2), *angles).transpose(1, 2)
        within(relative(ours, twin), MODULE_FLOAT64, f"rotary at {offset}, float64")


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_mlp(kind, length, layer_bundle, layers, twin):
    theirs = LlamaMLP(LlamaConfig(**config_to_hf(CONFIG)))
    load(theirs, layer_bundle, "model.layers.0.mlp.")
    x = draw_input(kind, length, np.float32)
    with precisely("float32"):
        ours = mlp(layers["float32"].mlp, jnp.asarray(x))
    within(relative(ours, theirs(torch.tensor(x))), MODULE_FLOAT32, f"MLP, {kind}, T={length}")
    with precisely("float64"):
        ours = mlp(layers["float64"].mlp, jnp.asarray(x, float))
        within(relative(ours, twin.mlp(torch.tensor(x).double())), MODULE_FLOAT64, f"MLP, {kind}, T={length}, float64")


@pytest.mark.parametrize("part", ["attention", "layer"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_attention_and_layer(part, kind, length, layer_bundle, layers, twin):
    """Random weights make every KV head distinct, so that a wrong grouping of query heads fails."""
    config = LlamaConfig(**config_to_hf(CONFIG), attn_implementation="eager")
    theirs = LlamaDecoderLayer(config, 0)
    load(theirs, layer_bundle, "model.layers.0.")
    x = draw_input(kind, length, np.float32)
    positions = np.arange(length)[None]
    cos_sin = LlamaRotaryEmbedding(config)(torch.tensor(x), torch.tensor(positions))
    future = torch.full((length, length), -torch.inf).triu(1)[None, None]
    module = theirs.self_attn if part == "attention" else theirs
    out = module(torch.tensor(x), position_embeddings=cos_sin, attention_mask=future)
    expected = out[0] if isinstance(out, tuple) else out
    for dtype, bound in (("float32", MODULE_FLOAT32), ("float64", MODULE_FLOAT64)):
        with precisely(dtype):
            layer = layers[dtype]
            angles = rope_cos_sin(jnp.asarray(positions), CONFIG, dtype)
            ours = attend(layer.self_attn if part == "attention" else layer, jnp.asarray(x, dtype), *angles)
            if dtype == "float64":
                angles = torch_model.rope_cos_sin(torch.tensor(positions), CONFIG, torch.float64)
                expected = (twin.self_attn if part == "attention" else twin)(torch.tensor(x).double(), *angles)
            bound = MODULE_FLOAT32_HUGE if (part, kind, dtype) == ("attention", "one huge", "float32") else bound
            within(relative(ours, expected), bound, f"{part}, {kind}, T={length}, {dtype}")


def load(module, bundle, prefix):
    state = {n.removeprefix(prefix): torch.tensor(t) for n, t in bundle.tensors.items() if n.startswith(prefix)}
    module.load_state_dict(state, strict=True)
    module.eval()
