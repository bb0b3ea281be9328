"""The three implementations on the same real weights, loaded once."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import smollm_torch.weights
from smollm_jax import weights


@pytest.fixture(scope="session")
def jax_model(weights_path):
    return weights.load(weights_path)[0]


@pytest.fixture(scope="session")
def twin(weights_path):
    return smollm_torch.weights.load(weights_path)[0]


@pytest.fixture(scope="session")
def hf(weights_path):
    return load_hf(weights_path)


def load_hf(path, **options):
    """transformers' own model, eager and float32; it would load missing or extra tensors without an exception."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"} | options
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()
