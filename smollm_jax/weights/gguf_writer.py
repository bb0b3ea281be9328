"""Hugging Face's tensors, config and tokenizer as a Llama GGUF, for llama.cpp and programs built on it.

The written file is read back by `gguf_reader.py` and compared; whatever a GGUF cannot store is an error. Needs the
`gguf` package. Source of keys and layout: llama.cpp, conversion of LlamaModel.
"""

import contextlib
import json
from pathlib import Path
from typing import Any, Literal

import einops
import ml_dtypes
import numpy as np

from smollm_jax.config import Config
from smollm_jax.errors import StorageError, UsageError, short_repr
from smollm_jax.runtime.atomic import replacing
from smollm_jax.runtime.files import import_optional
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.tokenizer.gguf import CONTROL, NORMAL, ROLES, UNUSED, USER_DEFINED, build_tokenizer
from smollm_jax.weights import gguf_reader, gguf_writer
from smollm_jax.weights.bundle import Bundle
from smollm_jax.weights.gguf_reader import (
    _FLOATS,
    _HEAD_DIM,
    _INTEGERS,
    _LAYER_NAMES,
    _TOP_LEVEL_NAMES,
    CONFIG_EOS_KEY,
    END_KEYS,
    GENERATION_KEY,
    SAMPLING_KEYS,
)
from smollm_jax.weights.safetensors_file import DIGEST, digest

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
PRE_TOKENIZERS = {"smollm": True, "gpt-2": False}  # llama.cpp's names of the supported ones; whether they split digits
# The GGUF type that stores a dtype exactly. float64 has none.
LOSSLESS: dict[str, GgufType] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    config: Config,
    tokenizer_files: dict[str, bytes],
    origin: str,
    kind: GgufType | None = None,
    generation_config: dict[str, Any] | None = None,
) -> None:
    """Writes a GGUF with matrices of type `kind` (None: the lossless one) and float32 norms, and reads it back.

    Two keys of ours hold digests of the tensors, as the reader decodes them, and of the other metadata.

    Raises `UsageError` for what a GGUF cannot store: a missing tokenizer or one of another kind than SmolLM2's, more
    than three end tokens, a rope_theta that is not a float32, values beyond float16, rows not a multiple of q8_0's 32.
    """
    gguf = import_optional("gguf", path)
    kinds = {tensor.dtype.name for tensor in tensors.values() if tensor.ndim == 2}
    if kind is None and (len(kinds) > 1 or not kinds <= LOSSLESS.keys()):
        raise UsageError(
            f"the matrices are {', '.join(sorted(kinds))}: no GGUF type stores them exactly; choose one with --type"
        )
    kind = kind or LOSSLESS[kinds.pop()]
    tokenizer = _tokenizer(tokenizer_files)
    fields = _metadata(config, tokenizer_files, tokenizer, origin or path.stem)
    fields |= _end_tokens(config, fields, generation_config) | _sampling(generation_config)
    expected = {}
    with contextlib.closing(gguf.GGUFWriter(path, "llama")) as writer:
        for key, value in fields.items():
            value_type = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}[type(value)]
            writer.add_key_value(key, value, gguf.GGUFValueType[value_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
        for name, tensor in tensors.items():
            tensor_type = _tensor_type(tensor, kind)
            raw, expected[name] = _encode(gguf, name, tensor, tensor_type)
            if (count := rotary_heads(name, config)) is not None:
                raw = einops.rearrange(raw, "(heads two h) D -> (heads h two) D", heads=count, two=2)
            raw = np.ascontiguousarray(raw)
            raw_dtype = gguf.GGMLQuantizationType[tensor_type.upper()] if raw.dtype == np.uint8 else None
            writer.add_tensor(gguf_name(name), raw, raw_dtype=raw_dtype)
        writer.add_string(DIGEST, digest(expected))
        fields = {key: entry.value for key, entry in writer.kv_data[0].items()}
        writer.add_string(gguf_reader.METADATA_DIGEST, gguf_reader.metadata_digest(fields))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    _compare(path, expected, config, tokenizer)


def rounded(tensors: dict[str, np.ndarray], kind: GgufType) -> dict[str, np.ndarray]:
    """The tensors rounded to a GGUF type, in float32; raises `UsageError` for values that the type cannot store."""
    gguf = import_optional("gguf", "the rounding error of a GGUF")
    return {name: _encode(gguf, name, tensor, _tensor_type(tensor, kind))[1] for name, tensor in tensors.items()}


def rounding_error(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> float:
    """The relative RMS error of `after` over all elements of `before`."""
    error = size = 0.0
    for name, tensor in before.items():
        exact = tensor.astype(np.float64)
        error += float(np.square(after[name].astype(np.float64) - exact).sum())
        size += float(np.square(exact).sum())
    return (error / size) ** 0.5 if error else 0.0


def _tensor_type(tensor: np.ndarray, kind: GgufType) -> GgufType:
    """The type of a tensor in a file of this type: norms are always float32, because llama.cpp supports no other."""
    return kind if tensor.ndim == 2 else "f32"


def gguf_name(name: str) -> str:
    """GGUF's name for one of Hugging Face's tensors."""
    layers, top = ({hf: ours for ours, hf in table.items()} for table in (_LAYER_NAMES, _TOP_LEVEL_NAMES))
    stem, part = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{part}"
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{layers[module]}.{part}"


def _encode(gguf: Any, name: str, tensor: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A tensor's rows as the file stores them, and the float32 values they decode to."""
    exact = np.asarray(tensor, np.float32)
    if kind == "f32":
        return exact, exact
    if kind == "bf16":
        rounded = np.ascontiguousarray(tensor.astype(ml_dtypes.bfloat16))
        return rounded.view(np.uint8), rounded.astype(np.float32)
    if kind == "f16":
        with np.errstate(over="ignore"):
            half = tensor.astype(np.float16)
        if not np.isfinite(half).all():
            raise UsageError(f"{name}: has values beyond 65,504, the largest float16; use --type bf16 or f32")
        return half, half.astype(np.float32)
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0]
    if exact.shape[-1] % block:
        raise UsageError(
            f"{name}: q8_0 needs rows of a multiple of {block} values, got {exact.shape[-1]}; use another --type"
        )
    rows = gguf.quants.quantize(np.ascontiguousarray(exact), gguf.GGMLQuantizationType.Q8_0)
    return rows, gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q8_0)


def rotary_heads(name: str, config: Config) -> int | None:
    """The number of heads of q_proj and k_proj, whose rows GGUF stores in interleaved rotary order; else None."""
    if name.endswith("self_attn.q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("self_attn.k_proj.weight") else None


def _metadata(config: Config, files: dict[str, bytes], tokenizer: Tokenizer, title: str) -> dict[str, Any]:
    """All metadata keys except the tensor types."""
    values = {key: getattr(config, name) for name, key in (_INTEGERS | _FLOATS).items()}
    # Needed where head_dim is not hidden_size / num_attention_heads.
    values |= dict.fromkeys(_HEAD_DIM, config.head_dim)
    core, vocabulary = json.loads(tokenizer.core.to_str()), tokenizer.core.get_vocab()
    # llama.cpp needs as many tokens as the embedding has rows; its own converter pads in the same way.
    tokens, types = [f"[PAD{i}]" for i in range(config.vocab_size)], [UNUSED] * config.vocab_size
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the config's vocab_size is {config.vocab_size}"
        )
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, NORMAL
    for added in core["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in core["model"]["merges"]]
    in_config = {"bos": (config.bos_token_id,), "eos": config.eos_token_ids, "pad": (config.pad_token_id,)}
    tokenizer_config, roles = json.loads(files.get("tokenizer_config.json", b"{}")), {}
    for role, name in ROLES.items():
        token = tokenizer_config.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        token_id = None if token is None else tokenizer.token_to_id(token)
        ids = [i for i in in_config.get(role, ()) if i is not None]
        if ids and token_id is not None and token_id not in ids:
            config_ids = ids[0] if len(ids) == 1 else ids
            raise UsageError(f"{role}_token_id is {config_ids} in config.json but {token_id} in tokenizer_config.json")
        if ids or token_id is not None:
            roles[f"tokenizer.ggml.{name}_token_id"] = ids[0] if ids else token_id
    return {
        "general.type": "model",
        "general.name": title,
        **values,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer_name(tokenizer),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        **roles,
        **_affixes(tokenizer, roles),
        "tokenizer.ggml.add_space_prefix": False,
        **_templates(tokenizer),
    }


def _affixes(tokenizer: Tokenizer, roles: dict[str, Any]) -> dict[str, bool]:
    """Whether bos is added before a text and eos after it: all that a GGUF can store of a post-processor."""
    affixes = {"bos": tokenizer.prefix_ids, "eos": tokenizer.suffix_ids}
    for role, ids in affixes.items():
        if ids and ids != [roles.get(f"tokenizer.ggml.{role}_token_id")]:
            place = "before" if role == "bos" else "after"
            raise UsageError(
                f"tokenizer.json: post_processor adds {ids} {place} a text: a GGUF can only store {role} there"
            )
    end = {"tokenizer.ggml.add_eos_token": True} if affixes["eos"] else {}
    return {"tokenizer.ggml.add_bos_token": bool(affixes["bos"])} | end


def _templates(tokenizer: Tokenizer) -> dict[str, Any]:
    """The default and the named chat templates, as llama.cpp's converter writes them."""
    fields: dict[str, Any] = {}
    for name in tokenizer.templates.sources:
        key = "tokenizer.chat_template" + ("" if name == "default" else f".{name}")
        fields[key] = tokenizer.templates.source(name)
    named = [name for name in tokenizer.templates.sources if name != "default"]
    return fields | ({"tokenizer.chat_templates": named} if named else {})


def _end_tokens(config: Config, fields: dict[str, Any], generation_config: dict[str, Any] | None) -> dict[str, Any]:
    """The keys of all end tokens: eos, then eot and eom, at which llama.cpp stops too."""
    eos = generation_config.get("eos_token_id") if generation_config else None
    candidates = [fields.get(END_KEYS[0]), *config.eos_token_ids, *(eos if isinstance(eos, list) else [eos])]
    ids = list(dict.fromkeys(i for i in candidates if i is not None))
    if len(ids) > len(END_KEYS):
        raise UsageError(f"the weights have the end tokens {ids}: a GGUF can only store {len(END_KEYS)}")
    lists = {CONFIG_EOS_KEY: list(config.eos_token_ids)} if isinstance(config.eos_token_id, tuple) else {}
    return dict(zip(END_KEYS, ids, strict=False)) | lists


def _sampling(generation_config: dict[str, Any] | None) -> dict[str, Any]:
    """The whole `generation_config.json` under our key and, if it samples, its parameters under llama.cpp's keys."""
    fields: dict[str, Any] = {GENERATION_KEY: json.dumps(generation_config)}
    if generation_config and generation_config.get("do_sample"):
        for name, key in SAMPLING_KEYS.items():
            if (value := generation_config.get(name)) is not None:
                fields[key] = value if name == "top_k" else float(value)
    return fields


def _tokenizer(files: dict[str, bytes]) -> Tokenizer:
    """The tokenizer of these files, which must split text as one of llama.cpp's pre-tokenizers does."""
    if not files.keys() & {"tokenizer.json", "vocab.json"}:
        raise UsageError("a GGUF needs a tokenizer, and the weights have no tokenizer.json: give one with --tokenizer")
    tokenizer = Tokenizer.from_files(files, Path("the weights"))
    _pre_tokenizer_name(tokenizer)
    return tokenizer


def _pre_tokenizer_name(tokenizer: Tokenizer) -> str:
    """llama.cpp's name for how a tokenizer splits text; raises `UsageError` for one not in `PRE_TOKENIZERS`."""
    rules = _text_rules(tokenizer)
    known = {
        name: _text_rules(Tokenizer(build_tokenizer([], [], [], digits=digits)))
        for name, digits in PRE_TOKENIZERS.items()
    }
    for name, known_rules in known.items():
        if rules == known_rules:
            return name
    changed = [name for name, value in known["smollm"].items() if rules[name] != value]
    raise UsageError(
        f"tokenizer.json: {', '.join(changed)} differs from SmolLM2's: a GGUF can only store the pre-tokenizers "
        f"{' and '.join(PRE_TOKENIZERS)}"
    )


def _text_rules(tokenizer: Tokenizer) -> dict[str, Any]:
    """How a tokenizer splits text before BPE merges, without its vocabulary."""
    core = json.loads(tokenizer.core.to_str())
    steps = core["pre_tokenizer"] or {}
    steps = [dict(step) for step in steps.get("pretokenizers", [steps])]
    for step in steps:
        step.pop("trim_offsets", None)  # affects a token's offsets, not its id
    names = ("ignore_merges", "byte_fallback")
    return {"pre_tokenizer": steps} | {f"model.{name}": bool(core["model"].get(name)) for name in names}


def _compare(path: Path, expected: dict[str, np.ndarray], config: Config, tokenizer: Tokenizer) -> None:
    """Raises an error unless reading the file gives these tensors, this config and this tokenizer."""
    tensors, read_config, files, *_ = gguf_reader.read(path, check_digests=False)  # every value is compared here
    for name, tensor in expected.items():
        if name not in tensors or tensors[name].tobytes() != np.ascontiguousarray(tensor).tobytes():
            raise StorageError(f"{path}: tensor {name} read back different from what was written")
    for name, value in vars(config).items():
        # A GGUF does not store initializer_range. A None may come back as the id of the tokenizer's token.
        read_value = getattr(read_config, name)
        if name != "initializer_range" and value not in (None, read_value, (read_value,)):
            raise UsageError(f"config field {name} is {value!r}, but a GGUF would store {read_value!r}")
    read_tokenizer = _tokenizer(files)
    before, after = _added_tokens(tokenizer), _added_tokens(read_tokenizer)
    if differing := [token for token, how in before.items() if after.get(token) != how]:
        raise UsageError(
            f"tokenizer.json: added tokens {short_repr(differing)} strip the text around them or match whole words "
            "only: a GGUF cannot store that"
        )
    if (tokenizer.prefix_ids, tokenizer.suffix_ids) != (read_tokenizer.prefix_ids, read_tokenizer.suffix_ids):
        raise StorageError(f"{path}: the tokens added around a text read back different from what was written")


def _added_tokens(tokenizer: Tokenizer) -> dict[str, tuple[Any, ...]]:
    """The id and matching options of each added token, by its text."""
    return {
        token.content: (i, token.special, token.lstrip, token.rstrip, token.single_word)
        for i, token in tokenizer.core.get_added_tokens_decoder().items()
    }


def write_gguf(path: Path, bundle: Bundle, kind: gguf_writer.GgufType | None = None) -> None:
    """Writes a Llama GGUF with the tokenizer in its metadata and matrices of type `kind` (None: the lossless one)."""
    with replacing(path) as temporary:
        gguf_writer.write(
            temporary,
            bundle.tensors,
            bundle.config,
            bundle.tokenizer_files,
            bundle.origin or path.stem,
            kind,
            bundle.generation_config,
        )
