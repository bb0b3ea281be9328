"""The config reads what Hugging Face writes, and refuses settings that this model does not support."""

import dataclasses

import pytest

from smollm_jax.config import PRESETS, Config, preset
from smollm_jax.config.hf_config import config_from_hf, config_to_hf
from smollm_jax.config.keys import generation_defaults
from smollm_jax.config.model import BOUNDS
from smollm_jax.errors import UsageError, short_repr
from smollm_jax.model import cost


def test_the_released_and_the_pretraining_config_differ_in_theta_and_length_only():
    released, pretrain = preset("smollm2-135m"), preset("smollm2-135m-pretrain")
    assert (released.rope_theta, released.max_position_embeddings) == (100_000.0, 8192)
    assert (pretrain.rope_theta, pretrain.max_position_embeddings) == (10_000.0, 2048)
    assert dataclasses.replace(pretrain, rope_theta=100_000.0, max_position_embeddings=8192) == released


def test_no_model_constant_has_a_default():
    assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(Config))


def test_parameters_cache_and_flops_are_the_known_numbers():
    released = preset("smollm2-135m")
    assert cost.count_parameters(released) == 134_515_008
    assert cost.parameter_table(released)[0][2] == 28_311_552
    assert cost.cache_bytes_per_token(released, 2) == 23_040
    assert cost.flops_per_token(released, 2048) == pytest.approx(1.019e9, rel=1e-3)
    assert cost.flops_per_token(released, 8192) == pytest.approx(1.656e9, rel=1e-3)
    assert cost.count_parameters(preset("smollm2-360m")) == 361_821_120
    assert cost.count_parameters(preset("smollm2-1.7b")) == 1_711_376_384


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_a_round_trip_in_both_layouts(name):
    config = preset(name)
    both = config_to_hf(config)
    old = {key: value for key, value in both.items() if key not in ("rope_parameters", "dtype")}
    new = {key: value for key, value in both.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert config_from_hf(both) == config_from_hf(old) == config_from_hf(new) == config


def test_several_eos_tokens_survive_a_round_trip():
    config = dataclasses.replace(preset("tiny"), eos_token_id=(0, 2))
    assert config_from_hf(config_to_hf(config)) == config
    assert config.eos_token_ids == (0, 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "mistral"}, "model_type"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_theta"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"hidden_size": "576"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": 49_152}, "eos_token_id"),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(change, named):
    with pytest.raises(UsageError, match=named):
        config_from_hf(config_to_hf(preset("tiny")) | change)


# The keys that transformers 4.x's `PreTrainedConfig.to_dict` writes in addition to a Llama's, with its defaults.
TRANSFORMERS_4_KEYS = {
    "_attn_implementation_autoset": True,
    "_commit_hash": "0" * 40,
    "add_cross_attention": False,
    "architectures": ["LlamaForCausalLM"],
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "pretraining_tp": 1,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}


@pytest.mark.parametrize(
    "more",
    [
        TRANSFORMERS_4_KEYS,
        {"unsloth_version": "2025.1.1", "unsloth_fixed": True, "unsloth_training_step": 3, "model_name": "a/b"},
        {"_attn_implementation": "sdpa", "attn_implementation": "flash_attention_2", "use_flash_attn": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1, "max_new_tokens": 64},
        {"architectures": ["LlamaModel"]},
        {"architectures": ["FSDPLlamaForCausalLM"]},
        {"layer_types": ["full_attention"] * 3},
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
        {"sliding_window": None, "quantization_config": None, "auto_map": None, "attn_logit_softcapping": None},
        {"partial_rotary_factor": 1.0},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"type": "default", "rope_type": "default", "partial_rotary_factor": 1}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": {}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 1.0}},
        {"torch_dtype": "torch.float32", "dtype": None},
        *({"torch_dtype": name, "dtype": None} for name in ("float", "torch.half", "fp16", "bf16", "auto")),
        {"pad_token_id": -1},
        {"eos_token_id": [0, -1], "auto_map": {}, "transformers_weights": "model.safetensors"},
        {"rope_scaling": {"rope_type": "default", "original_max_position_embeddings": 64, "finetuned": False}},
        {"logit_scale": 1.0, "residual_multiplier": 1, "embedding_multiplier": 1.0, "rotary_pct": 1.0},
        {"bias": False, "load_in_8bit": False, "num_local_experts": 0, "resid_dropout": 0.0},
        {"loss_type": "ForCausalLM", "fuse_cross_entropy": True, "license": "mit", "language": ["en"]},
        {"is_causal": True, "attention_dropout": None, "hidden_dropout": 0},
        {"pretraining_tp": 2, "tokenizer_class": "GPT2TokenizerFast", "model_max_length": 2048, "num_labels": 2},
    ],
)
def test_a_neutral_setting_is_accepted(more):
    config = config_from_hf(config_to_hf(preset("tiny")) | more)
    assert dataclasses.replace(config, eos_token_id=config.eos_token_ids[0]) == preset("tiny")
    assert config.eos_token_ids == (0,)


@pytest.mark.parametrize(
    "more",
    [
        {"is_encoder_decoder": True},
        {"add_cross_attention": True},
        {"tie_encoder_decoder": True},
        {"pruned_heads": {"0": [1]}},
        {"is_causal": False},
        {"use_sliding_window": True},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": "LlamaForCausalLM"},
        {"partial_rotary_factor": 0.5},
        {"partial_rotary_factor": True},
        {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "dynamic", "factor": 1.0}},
        {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 1.0}},
        {"rope_scaling": {"rope_type": "default", "mrope_section": [1]}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e5}}},
        {"quantization_config": {"quant_method": "awq"}},
        {"attention_multiplier": 0.5},
        {"logit_scale": 2.0},
        {"rotary_pct": 0.25},
        {"residual_multiplier": True},
        {"num_local_experts": 8},
        {"bias": True},
        {"attn_logit_softcapping": 50.0},
        {"attention_dropout": 0.1},
        {"prefix": "Once"},
        {"torch_dtype": "torch.float8_e4m3fn"},
        {"pad_token_id": -2},
        {"eos_token_id": [0, -2]},
        {"hidden_act": None},
        {"a_key_of_nobody": 0},
    ],
)
def test_a_setting_that_changes_the_model_is_refused_by_name(more):
    with pytest.raises(UsageError, match=next(iter(more))):
        config_from_hf(config_to_hf(preset("tiny")) | more)


def test_remote_code_is_refused_with_an_explanation():
    with pytest.raises(UsageError, match=r"auto_map=.* names Python code that comes with the weights"):
        config_from_hf(config_to_hf(preset("tiny")) | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}})


def test_generation_defaults_are_the_settings_that_differ_from_transformers():
    assert generation_defaults(config_to_hf(preset("tiny")) | TRANSFORMERS_4_KEYS) == {}
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 20, "forced_eos_token_id": 0}
    assert generation_defaults(TRANSFORMERS_4_KEYS | sampling | {"top_p": None}) == sampling


def test_every_size_and_constant_has_bounds_and_both_are_enforced():
    fields = {field.name: field.type for field in dataclasses.fields(Config)}
    assert set(BOUNDS) == {name for name, kind in fields.items() if kind in (int, float)}
    for name, (minimum, maximum) in BOUNDS.items():
        below, above = (minimum - 1, maximum + 1) if fields[name] is int else (minimum / 2, maximum * 2)
        for value in (below, above, str(minimum), None, True, float("nan"), 10**5000):
            with pytest.raises(UsageError, match=f"{name} must be .* got "):
                dataclasses.replace(preset("tiny"), **{name: value})


def test_rotary_frequencies_are_finite_at_both_bounds_of_theta():
    for theta in BOUNDS["rope_theta"]:
        config = dataclasses.replace(preset("tiny"), rope_theta=theta)
        assert all(0 < frequency <= 1 for frequency in config.rotary_frequencies)


def test_short_repr_is_one_short_line_for_any_value():
    nested: list = []
    for _ in range(60):
        nested = [nested, nested]
    for value in ("a\nb\x1b[31m", "x" * 10**6, nested, 10**5000, {"a": nested}, b"\0" * 10**6, "\ud800"):
        assert len(short_repr(value)) <= 120
        assert short_repr(value).isprintable()


@pytest.mark.parametrize("key", ["rms_norm_eps", "hidden_size", "initializer_range", "vocab_size"])
def test_a_missing_constant_is_not_guessed(key):
    values = config_to_hf(preset("tiny"))
    del values[key]
    with pytest.raises(UsageError, match=key):
        config_from_hf(values)


def test_a_missing_rope_theta_is_not_guessed():
    values = {k: v for k, v in config_to_hf(preset("tiny")).items() if k not in ("rope_theta", "rope_parameters")}
    with pytest.raises(UsageError, match="rope_theta"):
        config_from_hf(values)
