"""Converts the tokenizer in a GGUF's metadata to the files of a tokenizer folder. Imports no framework.

Sources: ggml, docs/gguf.md, for the keys; llama.cpp, src/llama-vocab.cpp, for the pre-tokenizers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from smollm_jax.errors import InputFileError, short_repr
from smollm_jax.runtime.files import import_optional, one_line
from smollm_jax.runtime.panics import silent_stderr
from smollm_jax.tokenizer.source import TEMPLATES

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # gguf.TokenType
NO_TOKEN = 2**32 - 1  # llama.cpp's LLAMA_TOKEN_NULL: -1 as a uint32
# Tokens that llama.cpp recognises by their text as special tokens that end a text, whatever the metadata say.
# Source: llama.cpp, src/llama-vocab.cpp, llama_vocab::impl::load, `special_eog_ids`; without those of code infilling.
END_OF_GENERATION = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
)
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # our name: GGUF's name
# Pre-tokenizers that split digits one by one and then apply GPT-2's pattern.
DIGIT_SPLITTING = ("smollm", "starcoder", "refact", "command-r", "codeshell")
GPT2 = ("gpt-2",)


class ForeignTokenizerError(InputFileError):
    """A GGUF's tokenizer is of an unsupported kind; its weights can still be read."""


def build_tokenizer(
    vocabulary: Sequence[str],
    merges: Sequence[str],
    special: Sequence[str],
    user_defined: Sequence[str] = (),
    *,
    digits: bool = True,
) -> tokenizers.Tokenizer:
    """SmolLM2's tokenizer from its vocabulary (in id order) and merges: Digits, then ByteLevel.

    `special` and `user_defined` entries are never split; `special` ones are encoded as plain text unless special tokens
    are parsed. transformers 5.23 rebuilds this tokenizer from a GGUF without Digits: then "12" is one token, although
    the model was trained with two.
    """
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    core = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=pairs))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level]) if digits else byte_level
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    core.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in user_defined])
    return core


def tokenizer_files(
    core: tokenizers.Tokenizer,
    max_length: int,
    roles: dict[str, str | None],
    chat_template: str | None,
    named_templates: dict[str, str] | None = None,
) -> dict[str, bytes]:
    """The files of a tokenizer folder; `roles` maps bos, eos, unk and pad to a token, or to None."""
    present = {f"{role}_token": token for role, token in roles.items() if token is not None}
    config: dict[str, Any] = {
        # Not the released GPT2Tokenizer, which transformers 5 rebuilds without Digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        **present,
    }
    named = {f"{TEMPLATES}/{name}.jinja": text.encode() for name, text in (named_templates or {}).items()}
    if chat_template is not None and named:  # template files replace those in the config
        named["chat_template.jinja"] = chat_template.encode()
    elif chat_template is not None:
        config["chat_template"] = chat_template
    return {
        "tokenizer.json": core.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
        "special_tokens_map.json": (json.dumps(present, indent=2) + "\n").encode(),
        **named,
    }


def read_gguf_tokenizer(path: Path) -> dict[str, bytes]:
    """The files of a tokenizer folder from a GGUF; raises as `files_from_gguf` does."""
    from smollm_jax.runtime.gguf_header import read_header

    fields, _ = read_header(path, import_optional("gguf", path).GGML_QUANT_SIZES)
    return files_from_gguf(fields, path)


def files_from_gguf(fields: dict[str, Any], path: Path) -> dict[str, bytes]:
    """The tokenizer folder's files from a GGUF's metadata.

    Raises `InputFileError` naming the malformed key, and `ForeignTokenizerError` if the tokenizer is missing or not a
    byte-level BPE of SmolLM2's kind.
    """
    model, pre = (fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if model is None and "tokenizer.ggml.tokens" not in fields:
        raise ForeignTokenizerError(f"{path}: has no tokenizer; give one with --tokenizer")
    if model != "gpt2" or pre not in (*DIGIT_SPLITTING, *GPT2):
        kinds = f"only 'gpt2' with {', '.join((*DIGIT_SPLITTING, *GPT2))} are supported"
        raise ForeignTokenizerError(
            f"{path}: metadata tokenizer.ggml.model and .pre are {short_repr(model)} and {short_repr(pre)}, {kinds}; "
            "give another tokenizer with --tokenizer"
        )

    def entries(name: str, kind: type) -> list[Any]:
        values = fields.get(f"tokenizer.ggml.{name}")
        if type(values) is not list or not all(type(value) is kind for value in values):
            raise InputFileError(f"{path}: metadata tokenizer.ggml.{name} must be an array of {kind.__name__}")
        return values

    tokens, merges = entries("tokens", str), entries("merges", str)
    types = entries("token_type", int) if "tokenizer.ggml.token_type" in fields else [NORMAL] * len(tokens)
    if not len(tokens) == len(set(tokens)) == len(types):
        counts = f"{len(tokens)} tokens, {len(set(tokens))} of them distinct, {len(types)} types"
        raise InputFileError(f"{path}: metadata tokenizer.ggml.tokens: {counts}")
    roles: dict[str, str | None] = {}
    for role, name in ROLES.items():
        i = token_id(fields, name)
        if i is not None and not (type(i) is int and 0 <= i < len(tokens)):
            raise InputFileError(f"{path}: metadata tokenizer.ggml.{name}_token_id is {short_repr(i)}, not a token id")
        roles[role] = None if i is None else tokens[i]
    kinds = dict(zip(tokens, types, strict=True))
    by_text = {token for token in END_OF_GENERATION if kinds.get(token) == NORMAL}
    special = [token for token, kind in kinds.items() if kind in (CONTROL, UNKNOWN) or token in by_text]
    user_defined = [token for token, kind in kinds.items() if kind == USER_DEFINED]
    try:
        with silent_stderr():
            core = build_tokenizer(tokens, merges, special, user_defined, digits=pre in DIGIT_SPLITTING)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # PanicException derives from BaseException
        raise InputFileError(f"{path}: metadata tokenizer.ggml.merges: {one_line(error)}") from error
    _add_affixes(core, fields, roles, path)
    template, named = _templates(fields, path)
    context = fields.get("llama.context_length")
    return tokenizer_files(core, context if type(context) is int else 0, roles, template, named)


def token_id(fields: dict[str, Any], name: str) -> Any:
    """The token id of a role in the metadata; None if the role has no token."""
    i = fields.get(f"tokenizer.ggml.{name}_token_id")
    return None if i == NO_TOKEN else i


def _add_affixes(core: tokenizers.Tokenizer, fields: dict[str, Any], roles: dict[str, str | None], path: Path) -> None:
    """Adds a post-processor for bos and eos if the metadata ask for it.

    Source: llama.cpp, src/llama-vocab.cpp, llama_vocab::impl::tokenize; both are off by default for a BPE.
    """
    affixes = {}
    for role in ("bos", "eos"):
        key = f"tokenizer.ggml.add_{role}_token"
        enabled = fields.get(key, False)
        if type(enabled) is not bool:
            raise InputFileError(f"{path}: metadata {key} must be a bool, got {short_repr(enabled)}")
        if enabled and roles[role] is None:
            raise InputFileError(f"{path}: metadata {key} is true, but the file names no {role} token")
        affixes[role] = [roles[role]] if enabled else []
    if not any(affixes.values()):
        return
    names = [*affixes["bos"], "$A", *affixes["eos"]]
    # Objects, because TemplateProcessing would parse a special token such as "A:1" as its own syntax.
    pieces = [{"Sequence": {"id": "A", "type_id": 0}} if name == "$A" else _special_piece(name) for name in names]
    used = {token: core.token_to_id(token) for token in dict.fromkeys(affixes["bos"] + affixes["eos"])}
    content = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in used.items()},
    }
    processor = processors.TemplateProcessing(single=["$A"], pair=["$A", "$B"], special_tokens=[])
    processor.__setstate__(json.dumps(content).encode())
    core.post_processor = processor


def _special_piece(token: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def _templates(fields: dict[str, Any], path: Path) -> tuple[str | None, dict[str, str]]:
    """The default chat template in the metadata, and the named ones."""
    prefix = "tokenizer.chat_template"
    for key, value in fields.items():
        if key.startswith(prefix) and key != "tokenizer.chat_templates" and type(value) is not str:
            raise InputFileError(f"{path}: metadata {key} must be a string, got {short_repr(value)}")
    named = {key.removeprefix(f"{prefix}."): fields[key] for key in fields if key.startswith(f"{prefix}.")}
    for name in named:
        if not name.replace("_", "").replace("-", "").isalnum():
            allowed = "only letters, digits, - and _ are allowed"
            raise InputFileError(f"{path}: metadata {prefix}.* has the name {short_repr(name)}: {allowed}")
    return fields.get(prefix), named
