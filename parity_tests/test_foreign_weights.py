"""Weights as other programs save them are read as transformers reads them, or refused by the name of a tensor.

Each file is written by the program itself where it is installed: transformers, safetensors, torch.compile.
"""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaModel

from smollm_jax import weights
from smollm_jax.config import keys
from smollm_jax.config.keys import generation_defaults
from smollm_jax.errors import InputFileError
from smollm_jax.weights import tensor_names
from smollm_jax.weights.torch_file import from_torch
from smollm_parity.tolerances import FLOAT32_LOGITS
from smollm_parity.torch_backend import load_transformers
from tests.small_files import SMALL
from tests.weights.test_gguf_read import written

TOKENS = np.arange(24).reshape(2, 12)
NORM, FREQUENCIES = "model.norm.weight", "model.layers.1.self_attn.rotary_emb.inv_freq"


def llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    values = dataclasses.asdict(SMALL) | {"tie_word_embeddings": tied}
    parameters = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    return LlamaForCausalLM(LlamaConfig(**values, rope_parameters=parameters)).eval()


def assert_same_tensors(path, model: LlamaForCausalLM):
    bundle, state = weights.read(path), model.state_dict()
    assert bundle.tensors.keys() == state.keys() - ({"lm_head.weight"} if bundle.config.tie_word_embeddings else set())
    for name, tensor in bundle.tensors.items():
        np.testing.assert_array_equal(tensor, from_torch(state[name]), err_msg=name)
    return bundle


def assert_read_as(path, model: LlamaForCausalLM):
    bundle = assert_same_tensors(path, model)
    with torch.inference_mode():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
    ours = weights.from_bundle(bundle)(jnp.asarray(TOKENS))
    np.testing.assert_allclose(ours, theirs, atol=FLOAT32_LOGITS * np.abs(theirs).max())


def rewritten(folder, change):
    """Saves a folder again with changed tensors."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in change(safetensors.torch.load_file(file)).items()}
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_with_every_key_that_transformers_writes(tmp_path, tied):
    model = llama(tied)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    assert_read_as(tmp_path, load_transformers(tmp_path))


def test_the_defaults_of_generate_in_a_config_are_those_that_transformers_takes_from_it(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 1.0, "repetition_penalty": 1.2}
    values = json.loads((tmp_path / "config.json").read_text()) | sampling
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = load_transformers(tmp_path).generation_config
    assert {key: getattr(loaded, key) for key in sampling} == sampling
    assert generation_defaults(values) == {key: value for key, value in sampling.items() if key != "top_p"}
    assert_same_tensors(tmp_path, model)


def test_every_default_of_generate_is_known_and_is_transformers():
    own = {"use_cache", "output_attentions", "output_hidden_states"}  # the model's too
    own |= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
    assert GenerationConfig().to_dict().keys() - own <= keys.GENERATION.keys()
    for key, default in GenerationConfig._get_default_generation_params().items():
        assert key in own or keys.GENERATION[key] == default, key


def test_save_model_keeps_the_head_of_a_tied_pair(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    assert "model.embed_tokens.weight" not in safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert_read_as(tmp_path, load_transformers(tmp_path))


def test_a_model_without_its_head_is_read_where_the_head_is_tied_and_refused_where_it_is_not(tmp_path):
    body = llama().model
    body.save_pretrained(tmp_path / "tied")
    assert "norm.weight" in safetensors.torch.load_file(tmp_path / "tied/model.safetensors")
    assert json.loads((tmp_path / "tied/config.json").read_text())["architectures"] == ["LlamaModel"]
    assert_read_as(tmp_path / "tied", load_transformers(tmp_path / "tied"))
    LlamaModel(llama(tied=False).config).save_pretrained(tmp_path / "untied")
    with pytest.raises(InputFileError, match=r"1 fault\(s\) in the weights: lm_head\.weight is missing"):
        weights.read(tmp_path / "untied")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [FREQUENCIES, "model.rotary_emb.inv_freq"])
def test_rotary_buffers_are_dropped_where_they_are_those_of_the_config_and_refused_where_not(tmp_path, name, dtype):
    model = llama()
    model.save_pretrained(tmp_path)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    rewritten(tmp_path, lambda tensors: tensors | {name: frequencies.to(dtype)})
    assert_same_tensors(tmp_path, load_transformers(tmp_path))
    for other in (frequencies / 2, frequencies * torch.tensor([1, 1.01]), frequencies[:1], frequencies * torch.nan):
        rewritten(tmp_path, lambda tensors, other=other: tensors | {name: other.to(dtype)})
        with pytest.raises(InputFileError, match=f"{name} begins .* not with the frequencies of rope_theta 10000"):
            weights.read(tmp_path)


@pytest.mark.parametrize("theta", [1e4, 1e5, 130_000.0, 5e5])
@pytest.mark.parametrize("dim", [4, 64, 128])
def test_old_spellings_of_the_frequencies_are_the_same_frequencies_and_a_near_theta_is_not(theta, dim):
    model = dataclasses.replace(SMALL, head_dim=dim, rope_theta=theta)
    steps = torch.arange(0, dim, 2).float()
    spellings = [
        1.0 / (theta ** (steps / dim)),  # transformers 4.28
        theta ** -(steps / dim),
        1.0 / (theta ** (steps.double() / dim)).float(),
    ]
    for spelling in spellings:
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            buffer = {FREQUENCIES: spelling.numpy().astype(dtype)}
            assert tensor_names.to_hf_names(buffer, model) == ({}, [])
    near = (1.0 / ((theta * 1.00001) ** (steps / dim))).numpy()
    assert tensor_names.to_hf_names({FREQUENCIES: near}, model)[1]


def wrapped(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def per_layer(wrapper):
    return lambda tensors: {
        name.replace(".layers.1.", f".layers.1.{wrapper}."): tensor for name, tensor in tensors.items()
    }


WRAPPED = {
    "torch.compile": wrapped("_orig_mod."),
    "DDP": wrapped("module."),
    "DDP of torch.compile": wrapped("module._orig_mod."),
    "torch.compile of DDP": wrapped("_orig_mod.module."),
    "FSDP": lambda tensors: per_layer("_fsdp_wrapped_module")(wrapped("_fsdp_wrapped_module.")(tensors)),
    "a LightningModule": wrapped("model."),
    "a LightningModule of torch.compile": wrapped("model._orig_mod."),
    "PEFT's, merged": wrapped("base_model.model."),
    "one layer compiled": per_layer("_orig_mod"),
    "activation checkpointing": per_layer("_checkpoint_wrapped_module"),
    "without a head": lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
    "without a head, DDP": lambda tensors: {
        f"module.{name.removeprefix('model.')}": tensor for name, tensor in tensors.items()
    },
}


@pytest.mark.parametrize("kind", ["hf", "pt"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", WRAPPED)
def test_what_wrapped_the_model_is_taken_from_every_name(tmp_path, kind, tied, name):
    model = llama(tied)
    model.save_pretrained(tmp_path)
    rewritten(tmp_path, WRAPPED[name])
    torch.save(safetensors.torch.load_file(tmp_path / "model.safetensors"), tmp_path / "x.pt")
    assert_same_tensors(tmp_path if kind == "hf" else tmp_path / "x.pt", model)


def test_the_second_copy_of_the_frequencies_is_dropped_too(tmp_path):
    """transformers keeps a second copy for scaled rotary embeddings; a program that saves every buffer writes it."""
    model = llama()
    model.save_pretrained(tmp_path)
    frequencies = model.model.rotary_emb.original_inv_freq
    rewritten(tmp_path, lambda tensors: tensors | {"model.rotary_emb.original_inv_freq": frequencies.clone()})
    assert_same_tensors(tmp_path, model)


def test_an_averaged_model_of_torch_is_read(tmp_path):
    """AveragedModel stores the number of averaged models next to the model's parameters."""
    model = llama()
    model.config.save_pretrained(tmp_path)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert "n_averaged" in averaged.state_dict()
    torch.save(averaged.state_dict(), tmp_path / "x.pt")
    assert_same_tensors(tmp_path / "x.pt", model)


def test_a_compiled_model_saves_names_that_are_read(tmp_path):
    model = llama()
    model.config.save_pretrained(tmp_path)
    torch.save(torch.compile(model).state_dict(), tmp_path / "x.PT")
    assert all(name.startswith("_orig_mod.") for name in torch.load(tmp_path / "x.PT"))
    assert_read_as(tmp_path / "x.PT", model)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t | {f"_orig_mod.{NORM}": t.pop(NORM)}, f"{NORM} is missing; _orig_mod.{NORM} is not part"),
        (lambda t: t | {"ema.model.layers.0.input_layernorm.weight": t[NORM]}, "ema.model.* is not part"),
        (lambda t: t | {"model._orig_mod.norm.weight": t[NORM]}, f"model._orig_mod.norm.weight and {NORM} are both"),
        (lambda t: t | {"model.layers.9.self_attn.rotary_emb.inv_freq": t[NORM][:2]}, "layers.9.* is not part"),
        (lambda t: t | {"model.layers.0.self_attn.rotary_emb.cos_cached": t[NORM]}, "cos_cached is not part"),
    ],
)
def test_names_that_are_not_the_models_are_refused(tmp_path, change, named):
    model = llama()
    model.save_pretrained(tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(InputFileError, match=named):
        weights.read(tmp_path)


@pytest.mark.parametrize(
    "layout",
    [
        lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}, "epoch": 3, "loss": 0.5},
        lambda state: {"module": state, "global_steps": 10, "rng": {"cpu": torch.ones(3)}},  # DeepSpeed
        lambda state: {"state": {"model": state, "timestamp": {}}},
        lambda state: {"state_dict": wrapped("model.")(state), "hyper_parameters": {"lr": 0.1}, "callbacks": {}},
        lambda state: {"model": state, "best": state, "config": {"lr": 0.1}},
    ],
)
def test_the_model_in_a_training_checkpoint_is_read(tmp_path, layout):
    model = llama()
    model.config.save_pretrained(tmp_path)
    torch.save(layout(model.state_dict()), tmp_path / "x.pt")
    assert_same_tensors(tmp_path / "x.pt", model)


def test_a_training_checkpoint_with_the_models_config_needs_no_other(tmp_path):
    model = llama()
    torch.save({"model": model.state_dict(), "config": model.config.to_dict()}, tmp_path / "x.pt")
    assert_read_as(tmp_path / "x.pt", model)


def test_a_training_checkpoint_of_two_models_is_not_guessed_at(tmp_path):
    model, average = llama(), llama()
    model.config.save_pretrained(tmp_path)
    torch.save({"model": model.state_dict(), "ema": average.state_dict()}, tmp_path / "x.pt")
    with pytest.raises(InputFileError, match=r"x\.pt: holds several models, under 'model', 'ema'"):
        weights.read(tmp_path / "x.pt")


def test_a_gguf_without_its_optional_keys_is_read_as_transformers_reads_it(tmp_path):
    """Except head_count_kv: without it transformers 5.23 leaves q and k in llama.cpp's order of rows."""
    written(tmp_path / "x.gguf", without=("llama.rope.dimension_count", "llama.rope.freq_base"))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    assert_read_as(tmp_path / "x.gguf", theirs.eval())
