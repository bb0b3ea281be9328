"""What the keys of a Hugging Face `config.json` mean for this model, beyond the fields of `Config`.

A key is in one of three tables: it never changes what the model computes (BOOKKEEPING); it changes nothing at the
values listed (FIXED, FACTORS, FIXED_LISTS); or it is a default of `generate` (GENERATION). `config_from_hf` refuses
all other keys. Standard library only.
Source: transformers, configuration_utils.py (`PreTrainedConfig`, of 5.23 and of 4.x, where `to_dict` wrote many more
keys) and models/llama/modeling_llama.py, which reads none of them.
"""

from typing import Any

# Keys with the values that this model supports, all equivalent; the first is the one written. Types must match too,
# because False == 0 in Python. None (null) is always allowed: transformers reads it as "not set".
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    # Arithmetic.
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "use_qk_norm": (False,),
    "pretraining_tp": (1, 2, 4, 8, 16),  # transformers 4 split matmuls into that many slices, 5 does not
    "bias": (False,),
    "lm_head_bias": (False,),
    "use_qkv_bias": (False,),
    "load_in_4bit": (False,),
    "load_in_8bit": (False,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),  # False: the half-split layout of every LlamaForCausalLM
    "partial_rotary_factor": (1.0, 1),
    "use_mrope": (False,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "use_sliding_window": (False,),
    "pruned_heads": ({}, []),
    # Training: dropout is not implemented.
    "attention_dropout": (0.0, 0),
    "attn_dropout": (0.0, 0),
    "dropout": (0.0, 0),
    "hidden_dropout": (0.0, 0),
    "hidden_dropout_prob": (0.0, 0),
    "resid_dropout": (0.0, 0),
    "embd_pdrop": (0.0, 0),
    "resid_pdrop": (0.0, 0),
    "attn_pdrop": (0.0, 0),
    # An encoder, or a decoder with cross-attention.
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    # Text that transformers' pipelines prepend to every prompt.
    "prefix": ("",),
}

# Factors of other models (Granite, Cohere, GLM, GPT-NeoX); 1 changes nothing.
FACTORS = frozenset(
    [
        "embedding_multiplier",
        "logit_scale",
        "logits_scaling",
        "residual_multiplier",
        "rope_pct",
        "rope_ratio",
        "rotary_pct",
    ]
)

# Keys with a list; each item must be one of these values, which this model treats alike.
FIXED_LISTS: dict[str, tuple[str, ...]] = {
    "architectures": (
        "LlamaForCausalLM",
        "LlamaModel",
        "FSDPLlamaForCausalLM",
    ),  # no LM head; saved under FSDP
    "layer_types": ("full_attention",),
}

# Keys that never change what the model computes. Keys that begin with "unsloth_" are treated alike.
BOOKKEEPING = frozenset(
    [
        # Origin of the model, and programs that write or read it.
        "_name_or_path",
        "name_or_path",
        "model_name",
        "_commit_hash",
        "transformers_version",
        "transformers.js_config",
        "is_llama_config",
        "finetuning_task",
        "transformers_weights",
        "trust_remote_code",
        "base_model",
        "base_model_name_or_path",
        "language",
        "license",
        "_comment",
        "task_specific_params",  # sampling settings of pipelines
        "tokenizer_class",
        # How the same numbers are computed or returned.
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_experts_implementation_internal",
        "_flash_attn_2_enabled",
        "attn_implementation",
        "experts_implementation",
        "use_flash_attention_2",
        "use_flash_attn",
        "use_liger_kernel",
        "use_memory_efficient_attention",
        "use_xformers",
        "fuse_cross_entropy",
        "fuse_norm",
        "fuse_swiglu",
        "chunk_size_feed_forward",
        "gradient_checkpointing",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_return_dict",
        "tie_last_hidden_states",  # selects the last tensor of output_hidden_states
        "torchscript",
        "use_cache",
        "use_bfloat16",
        "tf_legacy_loss",
        "_pre_quantization_dtype",
        # The loss that transformers computes from labels.
        "ignore_index",
        "keys_to_ignore_at_inference",
        "loss_type",
        # Classification heads, which this model does not have.
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "classifier_dropout",
        # Tokens of encoder-decoder and masked models.
        "is_decoder",
        "sep_token_id",
        "cls_token_id",
        "mask_token_id",
        "unk_token_id",
        # Used only by scaled rotary embeddings and sliding windows, both refused.
        "original_max_position_embeddings",
        "max_sequence_length",
        "max_seq_length",
        "seq_length",
        "model_max_length",
        "max_window_layers",
    ]
)

# Defaults of `generate` by key. transformers 4.x read them from config.json; 5.x does where the folder has no
# generation_config.json (generation/utils.py, `adjust_generation_fn`) and then drops them (`PreTrainedConfig`).
GENERATION: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "output_scores": False,
    "return_dict_in_generate": False,
    "remove_invalid_values": False,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
} | dict.fromkeys(
    [
        "max_new_tokens",
        "min_new_tokens",
        "min_p",
        "top_h",
        "max_time",
        "stop_strings",
        "bad_words_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "forced_decoder_ids",
        "decoder_start_token_id",
        "exponential_decay_length_penalty",
        "renormalize_logits",
        "sequence_bias",
        "guidance_scale",
        "penalty_alpha",
        "watermarking_config",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "prefill_chunk_size",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
        "low_memory",
        "output_logits",
        "token_healing",
        "dola_layers",
        "constraints",
        "force_words_ids",
        "use_mtp",
        "speculation_type",
        "is_assistant",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
    ]
)


def generation_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of `generate` in a config.json that differ from transformers' defaults; null means not set.

    They apply only if the folder has no generation_config.json, as in transformers 4 and 5.
    """
    return {
        key: values[key]
        for key, default in GENERATION.items()
        if values.get(key) is not None and (type(values[key]) is bool, values[key]) != (type(default) is bool, default)
    }
