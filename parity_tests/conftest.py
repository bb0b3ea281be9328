"""The three implementations on the same real weights, and the float64 truth, each computed once."""

import numpy as np
import pytest
import torch

import smollm_torch.weights
from smollm_jax import weights
from smollm_parity import ladder
from smollm_parity.torch_backend import load_transformers
from tests.trainer import train_here

LENGTH = 288  # tokens of the fast rungs: more than a block of attention, which has 256


@pytest.fixture(scope="session")
def bundle(weights_path):
    return weights.read(weights_path)


@pytest.fixture(scope="session")
def jax_model(bundle):
    return weights.from_bundle(bundle)


@pytest.fixture(scope="session")
def twin(bundle):
    return smollm_torch.weights.from_bundle(bundle)


@pytest.fixture(scope="session")
def hf(weights_path):
    return load_hf(weights_path)


@pytest.fixture(scope="session")
def instruct_export(weights_path, tmp_path_factory):
    """The real weights as we hand them over: a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("handed-over") / "instruct"
    weights.write(folder, weights.read(weights_path), "hf")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of the trainer, from scratch: 6 query heads on 2 KV heads."""
    run = tmp_path_factory.mktemp("runs") / "from-scratch"
    done = train_here(run, "--steps", "3")
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="session")
def trained_export(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("handed-over") / "trained"
    weights.write(folder, weights.read(trained), "hf")
    return folder


@pytest.fixture(scope="session", params=["instruct_export", "trained_export"])
def exported(request):
    """What we hand over, of the real weights and of a run trained here."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def source(exported, weights_path, trained):
    """What `exported` was written from."""
    return weights_path if exported.name == "instruct" else trained


@pytest.fixture(scope="session")
def short(real_tokens) -> np.ndarray:
    return real_tokens[:, :LENGTH]


@pytest.fixture(scope="session")
def truth(bundle, short):
    """Residual stream `[L, 1, T, D]` and logits `[1, T, V]` of the JAX model in float64."""
    return ladder.jax_stream(bundle, short, "float64")


@pytest.fixture(scope="session")
def texts(tokenizer, text_path) -> np.ndarray:
    """128 tokens from the middle of eight real texts `[8, 128]`.

    Not from their beginnings, which are nearly the same words: one unlucky rounding there would count eight times.
    """
    rows = [tokenizer.encode(p.read_text(encoding="utf-8")) for p in sorted(text_path.glob("*.txt"))[::31][:8]]
    return np.array([ids[len(ids) // 2 :][:128] for ids in rows], np.int32)


@pytest.fixture(scope="session")
def texts_truth(bundle, texts):
    """Residual stream and logits of the JAX model in float64 on the eight texts."""
    return ladder.jax_stream(bundle, texts, "float64")


@pytest.fixture(scope="session")
def window(real_tokens) -> np.ndarray:
    """T + 1 tokens: inputs and targets."""
    return real_tokens[:, : LENGTH + 1]


@pytest.fixture(scope="session")
def true_gradient(bundle, window):
    """Loss and gradient of the JAX model in float64."""
    return ladder.jax_gradients(bundle, window, "float64")


def load_hf(path, dtype=torch.float32):
    return load_transformers(path, dtype=dtype)
