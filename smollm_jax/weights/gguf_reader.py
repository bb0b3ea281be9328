"""A Llama GGUF as Hugging Face's tensors, config and tokenizer. Needs the `gguf` package to dequantise."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import einops
import numpy as np

from smollm_jax.config import Config
from smollm_jax.config.hf_config import parse_config
from smollm_jax.errors import InputFileError, short_repr
from smollm_jax.runtime.files import import_optional, one_line, parse_json
from smollm_jax.runtime.gguf_header import read_header
from smollm_jax.tokenizer.gguf import END_OF_GENERATION, ForeignTokenizerError, files_from_gguf, token_id
from smollm_jax.weights import gguf_reader
from smollm_jax.weights.bundle import Bundle
from smollm_jax.weights.safetensors_file import DIGEST, verify

_LAYER_NAMES = {
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
_TOP_LEVEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
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
# GGUF has a key for each kind of end token; Hugging Face lists them all under eos.
_END_ROLES = ("eos", "eot", "eom")
END_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in _END_ROLES)
# Hugging Face's generation_config.json is stored whole under a key of our own ("null": there is none), and the
# sampling parameters also under llama.cpp's keys.
GENERATION_KEY = "smollm_jax.generation_config"
METADATA_DIGEST = "smollm_jax.metadata_sha256"  # of an export, which has the digest of its tensors under `DIGEST`
KEPT_KEYS = ("general.architecture", "general.file_type")
CONFIG_EOS_KEY = "smollm_jax.config.eos_token_id"  # where config.json itself has a list
SAMPLING_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
_SAMPLING_RANGE = {
    "temperature": (0.0, math.inf),
    "top_k": (0, 2**31 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, math.inf),
}
# Keys for which llama.cpp also reads an array with one value per layer.
_PER_LAYER = ("llama.feed_forward_length", "llama.attention.head_count", "llama.attention.head_count_kv")
_HEAD_DIM = ("llama.rope.dimension_count", "llama.attention.key_length", "llama.attention.value_length")
# Keys of which this model supports only these values. A scaling factor of 0 is llama.cpp's way to say none.
_SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "llama.rope.scaling.type": ("none", "linear"),
    "llama.rope.scaling.factor": (1.0, 0.0),
    "llama.rope.scale_linear": (1.0, 0.0),  # its old name
    "llama.rope.scaling.attn_factor": (1.0,),
    "llama.attention.causal": (True,),
    "llama.attention.sliding_window": (0,),
    "llama.attention.max_alibi_bias": (0.0,),
    "llama.attention.clamp_kqv": (0.0,),
    "llama.use_parallel_residual": (False,),
    "llama.tensor_data_layout": ("Meta AI original pth",),  # the order of q's and k's rows that every Llama GGUF has
    "llama.expert_count": (0,),
    "llama.expert_used_count": (0,),
    "llama.expert_shared_count": (0,),
    "llama.pooling_type": (0,),
    # Granite's factors, which llama.cpp skips at 0.
    "llama.logit_scale": (0.0, 1.0),
    "llama.residual_scale": (0.0, 1.0),
    "llama.embedding_scale": (0.0, 1.0),
}
# Ignored keys: the context length before a RoPE scaling (a scaling itself is refused), whether the model was trained
# with it, and the epsilon of LayerNorm, which Llama does not use.
_IGNORED_KEYS = (
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.finetuned",
    "llama.attention.layer_norm_epsilon",
)


def read(
    path: Path, *, check_digests: bool = True
) -> tuple[dict[str, np.ndarray], Config, dict[str, bytes], str, dict[str, Any] | None]:
    """Tensors in float32, config, tokenizer files, origin, and what `generation_config.json` would say.

    An unsupported kind of tokenizer gives no tokenizer files. `InputFileError` names the invalid key or tensor. An
    export of ours must have the digests that it was written with; another program's file has none.

    GGUF stores the rows of q and k in interleaved rotary order; here they are permuted back to HF's half-split order,
    each with its own number of heads. Source: llama.cpp, conversion of LlamaModel (`permute`).
    """
    gguf = import_optional("gguf", path)
    fields, infos = read_header(path, gguf.GGML_QUANT_SIZES)
    if fields.get("split.count") not in (None, 0, 1):
        raise InputFileError(
            f"{path}: is one of {short_repr(fields['split.count'])} pieces of a GGUF; "
            "join them with llama.cpp's `llama-gguf-split --merge FIRST-PIECE OUTPUT`"
        )
    exported = check_digests and _is_unchanged_export(fields, path)
    config = _config(fields, path, tied=all(info.name != "output.weight" for info in infos))
    try:
        files = files_from_gguf(fields, path)
    except ForeignTokenizerError:  # the weights are usable without it; whoever needs the tokenizer reports it missing
        files = {}
    tokens = len(fields["tokenizer.ggml.tokens"]) if files else 0
    if tokens > config.vocab_size:
        raise InputFileError(
            f"{path}: metadata tokenizer.ggml.tokens has {tokens} tokens, the embedding only {config.vocab_size} rows"
        )
    data = np.memmap(path, np.uint8, mode="r") if infos else np.empty(0, np.uint8)
    tensors: dict[str, np.ndarray] = {}
    for info in infos:
        rows = data[info.start : info.start + info.bytes].reshape(*info.shape[:-1], info.row_bytes)
        try:
            array = np.array(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(info.kind)), np.float32)
        except (NotImplementedError, MemoryError, ValueError) as error:  # a type gguf can only write; a bad shape
            raise InputFileError(f"{path}: tensor {info.name} cannot be dequantised: {one_line(error)}") from error
        name = _hf_name(info.name)
        array = _in_hf_order(array, name, config)
        if name in tensors:  # stored under GGUF's name and under Hugging Face's
            raise InputFileError(f"{path}: tensor {info.name}: there is already a tensor for {name}")
        tensors[name] = array
    if exported:
        verify(tensors, fields.get(DIGEST), path)
    kinds = sorted({gguf.GGMLQuantizationType(info.kind).name for info in infos})
    title = fields.get("general.name", path.name)
    if type(title) is not str:
        raise InputFileError(f"{path}: metadata general.name must be a string, got {short_repr(title)}")
    origin = f"{' '.join(title.split())}, dequantised from GGUF ({', '.join(kinds)})"
    return tensors, config, files, origin, _generation(fields, config, path)


def metadata_digest(fields: dict[str, Any]) -> str:
    """The file type, and the sha256 of the metadata that the model and its tokenizer are made of.

    Names, descriptions and licenses (`general.`) may be edited, and a split file has keys of its own.
    """
    values = {
        key: float(np.float32(value)) if type(value) is float else value
        for key, value in fields.items()
        if key not in (DIGEST, METADATA_DIGEST) and (not key.startswith(("split.", "general.")) or key in KEPT_KEYS)
    }
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return f"{values.get('general.file_type')} {digest}"


def _is_unchanged_export(fields: dict[str, Any], path: Path) -> bool:
    """Whether a file is as it was exported, and not one that another program made of an export by quantising it.

    Such a program keeps unknown keys and changes the file type. Raises `InputFileError` if only metadata have changed.
    """
    stored, actual = fields.get(METADATA_DIGEST), metadata_digest(fields)
    if not isinstance(stored, str) or stored.split(" ")[0] != actual.split(" ")[0]:
        return False
    if stored != actual:
        raise InputFileError(
            f"{path}: metadata were changed since the export; if that was meant, remove the key {METADATA_DIGEST}"
        )
    return True


def q8_0(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The matrices stored as q8_0, by HF's name, as stored: int8 values `[O, I]` and float16 scales `[O, I / 32]`."""
    gguf = import_optional("gguf", path)
    fields, infos = read_header(path, gguf.GGML_QUANT_SIZES)
    config = _config(fields, path, tied=all(info.name != "output.weight" for info in infos))
    data, matrices = np.memmap(path, np.uint8, mode="r"), {}
    for info in infos:
        if info.kind == gguf.GGMLQuantizationType.Q8_0 and len(info.shape) == 2:
            name, rows = _hf_name(info.name), data[info.start : info.start + info.bytes].reshape(info.shape[0], -1)
            blocks = _in_hf_order(rows, name, config).reshape(info.shape[0], -1, 34)  # a float16, then 32 int8
            scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float16)
            matrices[name] = blocks[..., 2:].view(np.int8).reshape(info.shape), scales
    return matrices


def _in_hf_order(rows: np.ndarray, name: str, config: Config) -> np.ndarray:
    """A tensor with the rows of q_proj and k_proj permuted from interleaved to half-split rotary order."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for projection, count in heads.items():
        if name.endswith(f"self_attn.{projection}.weight") and rows.ndim == 2 and len(rows) % (2 * count) == 0:
            return einops.rearrange(rows, "(heads h two) D -> (heads two h) D", heads=count, two=2)
    return rows


def read_generation(path: Path) -> tuple[Config, dict[str, Any] | None]:
    """The config and the equivalent of `generation_config.json`, from the metadata alone."""
    fields, infos = read_header(path, import_optional("gguf", path).GGML_QUANT_SIZES)
    config = _config(fields, path, tied=all(info.name != "output.weight" for info in infos))
    return config, _generation(fields, config, path)


def _hf_name(name: str) -> str:
    """Hugging Face's name for a GGUF tensor; an unknown name is returned unchanged, for validation to report."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in _TOP_LEVEL_NAMES:
        return f"{_TOP_LEVEL_NAMES[parts[0]]}.{parts[1]}"
    return name


def _config(fields: dict[str, Any], path: Path, tied: bool) -> Config:
    """The config in the metadata; unsupported keys of the architecture are an error, as in HF's config.json."""
    if fields.get("general.architecture") != "llama":
        architecture = short_repr(fields.get("general.architecture"))
        raise InputFileError(f"{path}: metadata general.architecture is {architecture}, only 'llama' is supported")
    keys = _INTEGERS | _FLOATS
    for key, allowed in _SUPPORTED_VALUES.items():
        scaled = key in ("llama.rope.scaling.factor", "llama.rope.scale_linear")
        # llama.cpp ignores the factor if the scaling type is "none".
        if key not in fields or (scaled and fields.get("llama.rope.scaling.type") == "none"):
            continue
        if not any(type(fields[key]) is type(value) and fields[key] == value for value in allowed):
            only = " or ".join(map(repr, allowed))
            raise InputFileError(f"{path}: metadata {key}={short_repr(fields[key])} is not supported, only {only} is")
    known = {*keys.values(), *_SUPPORTED_VALUES, *_HEAD_DIM, *_IGNORED_KEYS}
    if unknown := sorted(key for key in fields if key.startswith("llama.") and key not in known):
        raise InputFileError(
            f"{path}: metadata has keys that this model does not support: {short_repr(', '.join(unknown))}"
        )
    fields = _with_defaults(fields)
    if missing := [key for key in keys.values() if key not in fields]:
        raise InputFileError(f"{path}: metadata is missing {', '.join(missing)}")
    for kinds, names in (((int,), _INTEGERS), ((int, float), _FLOATS)):
        for key in names.values():
            if type(fields[key]) not in kinds or not fields[key] > 0:
                what = "integer" if kinds == (int,) else "number"
                raise InputFileError(f"{path}: metadata {key} must be a positive {what}, got {short_repr(fields[key])}")
    for key in _HEAD_DIM:
        if fields.get(key, fields[_INTEGERS["head_dim"]]) != fields[_INTEGERS["head_dim"]]:
            raise InputFileError(
                f"{path}: metadata {key}={short_repr(fields[key])} differs from llama.rope.dimension_count="
                f"{short_repr(fields[_INTEGERS['head_dim']])}; only one head size is supported"
            )
    values = {name: fields[key] for name, key in _INTEGERS.items()}
    # GGUF stores float32: the shortest decimal of the same float32 restores 1e-5 from 9.99999974e-06.
    values |= {name: float(str(np.float32(fields[key]))) for name, key in _FLOATS.items()}
    values |= {name: token_id(fields, key) for name, key in _TOKENS.items()}
    ends = [i for i in dict.fromkeys(token_id(fields, name) for name in _END_ROLES) if i is not None]
    if CONFIG_EOS_KEY in fields:
        values["eos_token_id"] = fields[CONFIG_EOS_KEY]
    elif len(ends) > 1 and GENERATION_KEY not in fields:  # otherwise generation_config.json lists the other end tokens
        values["eos_token_id"] = ends
    # initializer_range is not in a GGUF and trained weights do not need it: the recipe's 1/sqrt(hidden).
    values |= {"initializer_range": values["hidden_size"] ** -0.5, "tie_word_embeddings": tied}
    return parse_config(values, path)


def _generation(fields: dict[str, Any], config: Config, path: Path) -> dict[str, Any] | None:
    """The equivalent of `generation_config.json`: our own key, else what llama.cpp would do with the file, else None.

    llama.cpp reads its own sampling keys, and treats every token with the text of a known end token as one.
    """
    if GENERATION_KEY in fields:
        if type(fields[GENERATION_KEY]) is not str:
            raise InputFileError(
                f"{path}: metadata {GENERATION_KEY} must be a string, got {short_repr(fields[GENERATION_KEY])}"
            )
        values = parse_json(fields[GENERATION_KEY], f"{path}: metadata {GENERATION_KEY}")
        if values is not None and not isinstance(values, dict):
            raise InputFileError(f"{path}: metadata {GENERATION_KEY} must be a JSON object, got {short_repr(values)}")
        return values
    sampling = {name: fields[key] for name, key in SAMPLING_KEYS.items() if key in fields}
    tokens = fields.get("tokenizer.ggml.tokens")
    by_text = [i for i, token in enumerate(tokens if type(tokens) is list else []) if token in END_OF_GENERATION]
    ends = [*config.eos_token_ids, *(i for i in by_text if i not in config.eos_token_ids)]
    ids = config.special_token_ids() | ({"eos_token_id": ends} if len(ends) > len(config.eos_token_ids) else {})
    if not sampling:
        return ids if ids != config.special_token_ids() else None
    # GGUF stores float32: this restores 0.9 from 0.89999998.
    numbers = {name: float(str(np.float32(x))) if type(x) is float else x for name, x in sampling.items()}
    for name, (low, high) in _SAMPLING_RANGE.items():  # llama.cpp treats values outside the range like its ends
        if type(numbers.get(name)) in (int, float):
            numbers[name] = min(max(numbers[name], low), high)
    return ids | {"do_sample": True} | numbers


def _with_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """The metadata with llama.cpp's defaults for missing optional keys, and equal per-layer values as one value.

    Source: llama.cpp, src/llama-model.cpp, `load_hparams`; the default head size is hidden size / heads.
    """
    fields = dict(fields)
    for key in _PER_LAYER:
        value = fields.get(key)
        if type(value) is list and value == value[:1] * len(value) and len(value) == fields.get("llama.block_count"):
            fields[key] = value[0]
    hidden, heads = fields.get("llama.embedding_length"), fields.get("llama.attention.head_count")
    if heads is not None:
        fields.setdefault("llama.attention.head_count_kv", heads)
    head_dim = fields.get("llama.attention.key_length")
    if head_dim is None and type(hidden) is int and type(heads) is int and heads > 0 and hidden % heads == 0:
        head_dim = hidden // heads
    if head_dim is not None:
        fields.setdefault("llama.rope.dimension_count", head_dim)
    fields.setdefault("llama.rope.freq_base", 10_000.0)
    if type(tokens := fields.get("tokenizer.ggml.tokens")) is list:
        fields.setdefault("llama.vocab_size", len(tokens))
    return fields


def read_gguf(path: Path) -> Bundle:
    """A Llama GGUF, dequantised to float32 by the `gguf` package, with the tokenizer in its metadata."""
    return Bundle(*gguf_reader.read(path))
