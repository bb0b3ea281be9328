"""Hugging Face's tensors, config and tokenizer as a Llama GGUF, for llama.cpp and what is built on it.

The file is read back by `gguf_reader.py`, and what a GGUF cannot hold is refused: nothing is lost in silence. Needs the
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
from smollm_jax.tokenizer.gguf import CONTROL, NORMAL, ROLES, UNUSED, USER_DEFINED, build
from smollm_jax.weights import gguf_reader, gguf_writer
from smollm_jax.weights.bundle import Bundle
from smollm_jax.weights.gguf_reader import (
    _FLOATS,
    _HEAD_DIM,
    _INTEGERS,
    _LAYER,
    _TOP,
    CONFIG_ENDS,
    ENDS,
    GENERATION,
    SAMPLING,
)

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
PRE = {"smollm": True, "gpt-2": False}  # the pre-tokenizers that are written, and whether they split digits
# What keeps every bit of a dtype. A float64 has none: it must be asked for.
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
    """Writes a GGUF, its matrices as `kind` (None: what keeps the bits), its norms as float32, and reads it back.

    Raises `UsageError` for what a GGUF cannot hold: no tokenizer or another than SmolLM2's kind, more than three tokens
    that end a text, a theta that is no float32, numbers beyond float16, rows that are no multiple of q8_0's 32.
    """
    gguf = import_optional("gguf", path)
    kinds = {tensor.dtype.name for tensor in tensors.values() if tensor.ndim == 2}
    if kind is None and (len(kinds) > 1 or not kinds <= LOSSLESS.keys()):
        raise UsageError(f"the matrices are {', '.join(sorted(kinds))}: no type of GGUF keeps their bits; give --type")
    kind = kind or LOSSLESS[kinds.pop()]
    tokenizer = _tokenizer(tokenizer_files)
    fields = _metadata(config, tokenizer_files, tokenizer, origin or path.stem)
    fields |= _ends(config, fields, generation_config) | _sampling(generation_config)
    expected = {}
    with contextlib.closing(gguf.GGUFWriter(path, "llama")) as writer:
        for key, value in fields.items():
            of = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}[type(value)]
            writer.add_key_value(key, value, gguf.GGUFValueType[of])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
        for name, tensor in tensors.items():
            stored = _stored(tensor, kind)
            raw, expected[name] = _encoded(gguf, name, tensor, stored)
            if (count := _heads(name, config)) is not None:
                raw = einops.rearrange(raw, "(heads two h) D -> (heads h two) D", heads=count, two=2)
            raw = np.ascontiguousarray(raw)
            as_type = gguf.GGMLQuantizationType[stored.upper()]
            writer.add_tensor(_gguf_name(name), raw, raw_dtype=as_type if raw.dtype == np.uint8 else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    _compare(path, expected, config, tokenizer)


def rounded(tensors: dict[str, np.ndarray], kind: GgufType) -> dict[str, np.ndarray]:
    """What a GGUF of this type gives back, in float32; raises `UsageError` for what the type cannot hold."""
    gguf = import_optional("gguf", "what a GGUF loses")
    return {name: _encoded(gguf, name, tensor, _stored(tensor, kind))[1] for name, tensor in tensors.items()}


def lost(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> float:
    """How far numbers are from those they were made from, as a share of these (RMS over all)."""
    error = size = 0.0
    for name, tensor in before.items():
        exact = tensor.astype(np.float64)
        error += float(np.square(after[name].astype(np.float64) - exact).sum())
        size += float(np.square(exact).sum())
    return (error / size) ** 0.5 if error else 0.0


def _stored(tensor: np.ndarray, kind: GgufType) -> GgufType:
    """How a tensor lies in a file of this type: llama.cpp multiplies norms in float32 only."""
    return kind if tensor.ndim == 2 else "f32"


def _gguf_name(name: str) -> str:
    """GGUF's name for one of Hugging Face's tensors."""
    layers, top = ({hf: ours for ours, hf in table.items()} for table in (_LAYER, _TOP))
    stem, part = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{part}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{layers[rest]}.{part}"


def _encoded(gguf: Any, name: str, tensor: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A tensor's rows as the file holds them, and the float32 numbers they stand for."""
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
            raise UsageError(f"{name}: has numbers beyond float16's largest, 65,504; give --type bf16 or f32")
        return half, half.astype(np.float32)
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0]
    if exact.shape[-1] % block:
        raise UsageError(f"{name}: rows of {exact.shape[-1]} do not divide into q8_0's blocks of {block}")
    rows = gguf.quants.quantize(np.ascontiguousarray(exact), gguf.GGMLQuantizationType.Q8_0)
    return rows, gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q8_0)


def _heads(name: str, config: Config) -> int | None:
    """Into how many heads the rows of q and k divide, which GGUF stores as interleaved rotary pairs; else None."""
    if name.endswith("self_attn.q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("self_attn.k_proj.weight") else None


def _metadata(config: Config, files: dict[str, bytes], tokenizer: Tokenizer, title: str) -> dict[str, Any]:
    """Every key but those of the tensors' types."""
    values = {key: getattr(config, name) for name, key in (_INTEGERS | _FLOATS).items()}
    # Needed where head_dim is not hidden_size / num_attention_heads.
    values |= dict.fromkeys(_HEAD_DIM, config.head_dim)
    core, vocabulary = json.loads(tokenizer.core.to_str()), tokenizer.core.get_vocab()
    # llama.cpp wants as many tokens as the embedding has rows; its own converter fills up the same way.
    tokens, types = [f"[PAD{i}]" for i in range(config.vocab_size)], [UNUSED] * config.vocab_size
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the config {config.vocab_size} rows")
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, NORMAL
    for added in core["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in core["model"]["merges"]]
    in_config = {"bos": (config.bos_token_id,), "eos": config.eos_token_ids, "pad": (config.pad_token_id,)}
    beside, roles = json.loads(files.get("tokenizer_config.json", b"{}")), {}
    for role, name in ROLES.items():
        token = beside.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        named = None if token is None else tokenizer.token_to_id(token)
        ids = [i for i in in_config.get(role, ()) if i is not None]
        if ids and named is not None and named not in ids:
            in_words = ids[0] if len(ids) == 1 else ids
            raise UsageError(f"the config says {role}_token_id {in_words}, tokenizer_config.json {named}")
        if ids or named is not None:
            roles[f"tokenizer.ggml.{name}_token_id"] = ids[0] if ids else named
    return {
        "general.type": "model",
        "general.name": title,
        **values,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre(tokenizer),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        **roles,
        **_affixes(tokenizer, roles),
        "tokenizer.ggml.add_space_prefix": False,
        **_templates(tokenizer),
    }


def _affixes(tokenizer: Tokenizer, roles: dict[str, Any]) -> dict[str, bool]:
    """Whether bos is put before a text and eos after it, which is all that a GGUF can say of a post-processor."""
    affixes = {"bos": tokenizer.prefix_ids, "eos": tokenizer.suffix_ids}
    for role, ids in affixes.items():
        if ids and ids != [roles.get(f"tokenizer.ggml.{role}_token_id")]:
            place = "before" if role == "bos" else "after"
            raise UsageError(f"tokenizer.json: post_processor puts {ids} {place} a text: a GGUF can only name {role}")
    end = {"tokenizer.ggml.add_eos_token": True} if affixes["eos"] else {}
    return {"tokenizer.ggml.add_bos_token": bool(affixes["bos"])} | end


def _templates(tokenizer: Tokenizer) -> dict[str, Any]:
    """The chat template and those with names, as llama.cpp's converter writes them."""
    fields: dict[str, Any] = {}
    for name in tokenizer.templates.sources:
        key = "tokenizer.chat_template" + ("" if name == "default" else f".{name}")
        fields[key] = tokenizer.templates.source(name)
    named = [name for name in tokenizer.templates.sources if name != "default"]
    return fields | ({"tokenizer.chat_templates": named} if named else {})


def _ends(config: Config, fields: dict[str, Any], generation_config: dict[str, Any] | None) -> dict[str, Any]:
    """The keys for every token that ends a text: eos, then eot and eom, which llama.cpp stops at too."""
    ends = generation_config.get("eos_token_id") if generation_config else None
    first = fields.get(ENDS[0])
    wanted = [first, *config.eos_token_ids, *(ends if isinstance(ends, list) else [ends])]
    ids = list(dict.fromkeys(i for i in wanted if i is not None))
    if len(ids) > len(ENDS):
        raise UsageError(f"the tokens {ids} end a text: a GGUF has places for {len(ENDS)} of them")
    lists = {CONFIG_ENDS: list(config.eos_token_ids)} if isinstance(config.eos_token_id, tuple) else {}
    return dict(zip(ENDS, ids, strict=False)) | lists


def _sampling(generation_config: dict[str, Any] | None) -> dict[str, Any]:
    """`generation_config.json` whole, for who reads it back, and its sampling by llama.cpp's keys where it samples."""
    fields: dict[str, Any] = {GENERATION: json.dumps(generation_config)}
    if generation_config and generation_config.get("do_sample"):
        for name, key in SAMPLING.items():
            if (value := generation_config.get(name)) is not None:
                fields[key] = value if name == "top_k" else float(value)
    return fields


def _tokenizer(files: dict[str, bytes]) -> Tokenizer:
    """The tokenizer of these files, which must split text as one of llama.cpp's pre-tokenizers does."""
    if not files.keys() & {"tokenizer.json", "vocab.json"}:
        raise UsageError("a GGUF holds a tokenizer, and there is no tokenizer.json beside the weights")
    tokenizer = Tokenizer.from_files(files, Path("the weights"))
    _pre(tokenizer)
    return tokenizer


def _pre(tokenizer: Tokenizer) -> str:
    """llama.cpp's name for how a tokenizer splits text; raises `UsageError` where it has none that is written here."""
    rules = _text_rules(tokenizer)
    known = {name: _text_rules(Tokenizer(build([], [], [], digits=digits))) for name, digits in PRE.items()}
    for name, ours in known.items():
        if rules == ours:
            return name
    changed = [name for name, ours in known["smollm"].items() if rules[name] != ours]
    raise UsageError(
        f"tokenizer.json: {', '.join(changed)} not SmolLM2's: a GGUF can only name its kind, {' or '.join(PRE)}"
    )


def _text_rules(tokenizer: Tokenizer) -> dict[str, Any]:
    """How text becomes symbols to merge, without the vocabulary itself."""
    core = json.loads(tokenizer.core.to_str())
    steps = core["pre_tokenizer"] or {}
    steps = [dict(step) for step in steps.get("pretokenizers", [steps])]
    for step in steps:
        step.pop("trim_offsets", None)  # says where a token lies in the text, not which it is
    names = ("ignore_merges", "byte_fallback")
    return {"pre_tokenizer": steps} | {f"model.{name}": bool(core["model"].get(name)) for name in names}


def _compare(path: Path, expected: dict[str, np.ndarray], config: Config, tokenizer: Tokenizer) -> None:
    """Raises unless the file gives back these numbers, this config and this tokenizer."""
    tensors, found, files, *_ = gguf_reader.read(path)
    for name, tensor in expected.items():
        if name not in tensors or tensors[name].tobytes() != np.ascontiguousarray(tensor).tobytes():
            raise StorageError(f"{path}: tensor {name} read back different from what was written")
    for name, value in vars(config).items():
        # A GGUF has no place for the initial spread; a role that only the tokenizer had is the config's now too.
        if name != "initializer_range" and value not in (None, getattr(found, name), (getattr(found, name),)):
            raise UsageError(f"config field {name} is {value!r}, a GGUF would hold {getattr(found, name)!r}")
    again = _tokenizer(files)
    before, after = _added(tokenizer), _added(again)
    if differing := [token for token, how in before.items() if after.get(token) != how]:
        raise UsageError(
            f"tokenizer.json: added tokens {short_repr(differing)} strip the text around them or match whole words "
            "only: a GGUF cannot hold that"
        )
    if (tokenizer.prefix_ids, tokenizer.suffix_ids) != (again.prefix_ids, again.suffix_ids):
        raise StorageError(f"{path}: what stands around a text reads back different from what was written")


def _added(tokenizer: Tokenizer) -> dict[str, tuple[Any, ...]]:
    """Each added token by its text: its id and how it is matched."""
    return {
        token.content: (i, token.special, token.lstrip, token.rstrip, token.single_word)
        for i, token in tokenizer.core.get_added_tokens_decoder().items()
    }


def write_gguf(path: Path, bundle: Bundle, kind: gguf_writer.GgufType | None = None) -> None:
    """A Llama GGUF with the tokenizer in its metadata, its matrices as `kind`: by default what keeps every bit."""
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
