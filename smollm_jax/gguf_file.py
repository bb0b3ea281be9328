"""A Llama GGUF as Hugging Face's tensors, config and tokenizer. Needs the `gguf` package to dequantise."""

from pathlib import Path
from typing import Any

import einops
import numpy as np

from smollm_jax.config import Config, shown
from smollm_jax.errors import InputFileError
from smollm_jax.files import need, one_line, parse_config
from smollm_jax.gguf_header import read_header

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INTEGERS = {
    "vocab_size": "llama.vocab_size",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.rope.dimension_count",
    "max_position_embeddings": "llama.context_length",
}
_FLOATS = {"rope_theta": "llama.rope.freq_base", "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon"}
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
# Keys with one value this model computes, and two that say head_dim again.
_FIXED = {"llama.rope.scaling.type": "none", "llama.expert_count": 0, "llama.expert_used_count": 0}
_HEAD_DIM = ("llama.attention.key_length", "llama.attention.value_length")


def read(path: Path) -> tuple[dict[str, np.ndarray], Config, dict[str, bytes], str]:
    """Tensors in float32, config, tokenizer files and origin; `InputFileError` names the key or tensor at fault.

    GGUF stores the rows of q and k for interleaved rotary pairs; here they go back to HF's half-split order, each
    with its own number of heads. Source: llama.cpp, conversion of LlamaModel (`permute`).
    """
    gguf = need("gguf", path)
    from smollm_jax.tokenizer import files_from_gguf

    fields, infos = read_header(path, gguf.GGML_QUANT_SIZES)
    config = _config(fields, path, tied=all(info.name != "output.weight" for info in infos))
    files = files_from_gguf(fields, config.vocab_size, path)
    data = np.memmap(path, np.uint8, mode="r") if infos else np.empty(0, np.uint8)
    tensors: dict[str, np.ndarray] = {}
    for info in infos:
        rows = data[info.start : info.start + info.bytes].reshape(*info.shape[:-1], info.row_bytes)
        try:
            array = np.array(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(info.kind)), np.float32)
        except (NotImplementedError, MemoryError, ValueError) as error:  # a kind gguf only writes; a size, a shape
            raise InputFileError(f"{path}: tensor {info.name} cannot be dequantised: {one_line(error)}") from error
        name = _hf_name(info.name)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if name.endswith(f"self_attn.{projection}.weight") and array.ndim == 2 and len(array) % (2 * count) == 0:
                array = einops.rearrange(array, "(heads h two) D -> (heads two h) D", heads=count, two=2)
        if name in tensors:  # once by GGUF's name for it, once by Hugging Face's
            raise InputFileError(f"{path}: tensor {info.name} is {name} a second time")
        tensors[name] = array
    kinds = sorted({gguf.GGMLQuantizationType(info.kind).name for info in infos})
    title = fields.get("general.name", path.name)
    if type(title) is not str:
        raise InputFileError(f"{path}: metadata general.name must be a string, got {shown(title)}")
    return tensors, config, files, f"{' '.join(title.split())}, dequantised from GGUF ({', '.join(kinds)})"


def _hf_name(name: str) -> str:
    """Hugging Face's name for a GGUF tensor; an unknown name comes back as it is, for the check to name it."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in _TOP:
        return f"{_TOP[parts[0]]}.{parts[1]}"
    return name


def _config(fields: dict[str, Any], path: Path, tied: bool) -> Config:
    """The config in the metadata; a key of the architecture that this model cannot honour is refused, as in HF's."""
    if fields.get("general.architecture") != "llama":
        found = shown(fields.get("general.architecture"))
        raise InputFileError(f"{path}: metadata general.architecture is {found}, only 'llama' is supported")
    keys = _INTEGERS | _FLOATS
    if missing := [key for key in keys.values() if key not in fields]:
        raise InputFileError(f"{path}: metadata lacks {', '.join(missing)}")
    for key, allowed in _FIXED.items():
        if key in fields and (type(fields[key]), fields[key]) != (type(allowed), allowed):
            raise InputFileError(f"{path}: metadata {key}={shown(fields[key])} is not supported, only {allowed!r} is")
    known = {*keys.values(), *_FIXED, *_HEAD_DIM}
    if unknown := sorted(key for key in fields if key.startswith("llama.") and key not in known):
        raise InputFileError(f"{path}: metadata has keys this model cannot honour: {shown(', '.join(unknown))}")
    for kinds, names in (((int,), _INTEGERS), ((int, float), _FLOATS)):
        for key in names.values():
            if type(fields[key]) not in kinds or not fields[key] > 0:
                what = "integer" if kinds == (int,) else "number"
                raise InputFileError(f"{path}: metadata {key} must be a positive {what}, got {shown(fields[key])}")
    for key in _HEAD_DIM:
        if fields.get(key, fields[_INTEGERS["head_dim"]]) != fields[_INTEGERS["head_dim"]]:
            raise InputFileError(f"{path}: metadata {key}={shown(fields[key])} is not llama.rope.dimension_count")
    values = {name: fields[key] for name, key in _INTEGERS.items()}
    # GGUF holds float32: 9.99999974e-06 is 1e-5, found again as the shortest decimal with the same float32.
    values |= {name: float(str(np.float32(fields[key]))) for name, key in _FLOATS.items()}
    values |= {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKENS.items()}
    # Not in a GGUF and not used by trained weights: the recipe's 1/sqrt(hidden).
    values |= {"initializer_range": values["hidden_size"] ** -0.5, "tie_word_embeddings": tied}
    return parse_config(values, path)
