"""Rung 10: not one model but the family. Any config transformers accepts and we accept gives the same function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import smollm_torch.weights
from smollm_jax import weights
from smollm_jax.config import Config, preset
from smollm_jax.config.hf_config import config_from_hf, config_to_hf
from smollm_jax.weights import mapping
from smollm_jax.weights.bundle import Bundle
from smollm_jax.weights.torch_file import from_torch
from smollm_parity.tolerances import FLOAT32_LOGITS, within

SMALL = dataclasses.replace(preset("tiny"), vocab_size=512)


def random_transformers(config: Config) -> LlamaForCausalLM:
    """transformers' model with random weights, its norms far from 1 so that a missing or misplaced scale shows."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config_to_hf(config), attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1, 0.5)
    return model


def compare(config: Config, length: int, bound: float = FLOAT32_LOGITS) -> None:
    """transformers, ours and the twin on one random text, through the weight rules."""
    theirs = random_transformers(config)
    state = {name: from_torch(tensor.detach()) for name, tensor in theirs.state_dict().items()}
    bundle = mapping.check(Bundle(state, config_from_hf(theirs.config.to_dict())), "transformers")
    assert bundle.config == config
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, length))
    with torch.inference_mode():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
        twin = smollm_torch.weights.from_bundle(bundle)(torch.tensor(tokens)).numpy()
    ours = jax.jit(lambda model, tokens: model(tokens))(weights.from_bundle(bundle), jnp.asarray(tokens))
    largest = np.abs(expected).max()
    within(np.abs(np.asarray(ours) - expected).max() / largest, bound, f"logits against transformers, T={length}")
    within(np.abs(twin - expected).max() / largest, bound, f"the twin's logits against transformers, T={length}")


@pytest.mark.parametrize("length", [1, 7, 200])
def test_a_small_model(length):
    compare(SMALL, length)


CONFIGS = {
    "kv_heads": st.integers(1, 4),
    "group": st.integers(1, 4),
    "head_dim": st.sampled_from([2, 8, 14, 32]),
    "width": st.sampled_from([5, 12, 16]),  # hidden size over heads: transformers wants it whole
    "layers": st.integers(1, 4),
    "tied": st.booleans(),
    "theta": st.sampled_from([500.0, 10_000.0, 1e6]),
    "eps": st.sampled_from([1e-6, 1e-5, 1e-3]),
}
REPEATABLE = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def compare_small(kv_heads, group, head_dim, width, layers, tied, theta, eps):
    config = dataclasses.replace(
        SMALL,
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * group,
        head_dim=head_dim,
        hidden_size=kv_heads * group * width,
        num_hidden_layers=layers,
        tie_word_embeddings=tied,
        rope_theta=theta,
        rms_norm_eps=eps,
    )
    compare(config, 33)


@settings(REPEATABLE, max_examples=4)
@given(**CONFIGS)
def test_any_small_model(**config):
    compare_small(**config)


@pytest.mark.slow
@settings(REPEATABLE, max_examples=12)
@given(**CONFIGS)
def test_more_small_models(**config):
    compare_small(**config)


@pytest.mark.parametrize(
    "name", ["smollm2-135m", *(pytest.param(name, marks=pytest.mark.slow) for name in ("smollm2-360m", "smollm2-1.7b"))]
)
def test_a_real_width_at_two_layers(name):
    compare(dataclasses.replace(preset(name), num_hidden_layers=2), 40)


@pytest.mark.overnight
def test_the_whole_360m():
    compare(preset("smollm2-360m"), 100)
