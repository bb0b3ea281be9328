"""A tokenizer's special tokens: their roles, added tokens, and those that the post-processor adds to a text."""

import functools
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import processors

from smollm_jax.errors import InputFileError, short_repr
from smollm_jax.runtime.panics import catch_panics

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token


def special_affixes(core: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the post-processor adds before and after a text, as in transformers' `tokenizer(text)`."""
    vocabulary = core.get_vocab(with_added_tokens=False)
    text = next((chr(byte) for byte, symbol in enumerate(byte_symbols()[:128]) if symbol in vocabulary), "")
    encoding = core.encode(text, add_special_tokens=True)
    positions = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
    if len(positions) != len(text):
        raise ValueError("post_processor must not change the ids of the text")
    start, end = (positions[0], positions[-1] + 1) if positions else (len(encoding.ids), len(encoding.ids))
    before, after = encoding.ids[:start], encoding.ids[end:]
    if unknown := [i for i in before + after if core.id_to_token(i) is None]:
        raise ValueError(f"post_processor adds id {unknown[0]}, which is not in the vocabulary")
    return before, after


def special_roles(
    core: tokenizers.Tokenizer, config: Mapping[str, Any], legacy: Mapping[str, Any], where: str
) -> dict[str, str]:
    """The special tokens by role, which chat templates read as variables.

    `config` is tokenizer_config.json, `legacy` special_tokens_map.json. `legacy` has precedence for the standard roles,
    and `config` for roles of one model, such as `image_token`. Source of the rules: transformers,
    tokenization_utils_base.py, `_from_pretrained` and `PreTrainedTokenizerBase.__init__`.
    """
    standard: dict[str, str | None] = {}
    if core.padding:
        standard["pad_token"] = core.padding["pad_token"]
    if str(config.get("tokenizer_class")).startswith("GPT2Tokenizer") and core.token_to_id("<|endoftext|>") is not None:
        standard |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")  # the class's defaults
    model_specific: dict[str, str | None] = {}
    for path, values in (("special_tokens_map.json", legacy), ("tokenizer_config.json", config)):
        for key in ("model_specific_special_tokens", "extra_special_tokens"):
            named = values.get(key)
            model_specific |= _roles(named if isinstance(named, dict) else {}, f"{where}/{path}")
        named = {role: value for role, value in values.items() if role.endswith("_token") and _is_token(value)}
        others = {role: value for role, value in named.items() if role not in ROLES}
        model_specific |= _roles(others, f"{where}/{path}")
    for path, values in (("tokenizer_config.json", config), ("special_tokens_map.json", legacy)):
        standard |= _roles({role: values[role] for role in ROLES if role in values}, f"{where}/{path}")
    roles = {role: standard.get(role) for role in ROLES} | model_specific
    return {role: token for role, token in roles.items() if token is not None}


def _is_token(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and value.get("__type") == "AddedToken")


def _roles(values: Mapping[str, object], path: str) -> dict[str, str | None]:
    return {role: None if value is None else _content(value, role, path) for role, value in values.items()}


def add_tokens(
    core: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    added: Mapping[str, Any],
    roles: Mapping[str, str],
    where: str,
) -> None:
    """Adds the tokens that are missing from tokenizer.json, as transformers does; `added` is added_tokens.json.

    Raises `InputFileError` if a token's id in a file differs from the one it gets. Source: transformers,
    tokenization_utils_base.py `_from_pretrained` and tokenization_utils_tokenizers.py `TokenizersBackend.__init__`.
    """
    path = f"{where}/tokenizer_config.json"
    extra = [config.get(key) for key in ("extra_special_tokens", "additional_special_tokens")]
    listed = next((tokens for tokens in extra if isinstance(tokens, list) and tokens), [])
    special = [*roles.values(), *(_content(token, "additional_special_tokens", path) for token in listed)]
    if "added_tokens_decoder" in config:
        declared = _declared(config["added_tokens_decoder"], path)
    else:
        path = f"{where}/added_tokens.json"
        flags = {token: token in special for token in added}
        declared = {
            i: tokenizers.AddedToken(token, normalized=not flags[token], special=flags[token])
            for token, i in sorted(added.items(), key=lambda item: _id(str(item[1])))
        }
    named = {token.content: token for token in declared.values()}
    for token in named.keys() & set(roles.values()):
        named[token].special = True
    if (eos := roles.get("eos_token")) is not None and core.token_to_id(eos) is None and eos not in named:
        # transformers adds it with a new id, for which the embedding has no row: no text would ever end.
        raise InputFileError(f"{where}/tokenizer_config.json: eos_token {short_repr(eos)} is not in the vocabulary")
    present = {token.content for token in core.get_added_tokens_decoder().values()} | named.keys()
    missing = [tokenizers.AddedToken(token, special=True) for token in special if token not in present]
    catch_panics(lambda: core.add_tokens([*named.values(), *missing]), path)
    for i, token in declared.items():
        check_id(core, token.content, i, path)


def _declared(tokens: object, path: str) -> dict[int, tokenizers.AddedToken]:
    """The tokens of an `added_tokens_decoder` by id, in ascending order."""
    if not isinstance(tokens, dict) or not all(isinstance(token, dict) for token in tokens.values()):
        raise InputFileError(f"{path}: added_tokens_decoder must be an object of objects, got {short_repr(tokens)}")
    declared = {}
    for i, token in sorted(tokens.items(), key=lambda item: _id(item[0])):
        entry = f"added_tokens_decoder {short_repr(i)}"
        _content(token, entry, path)
        if unknown := token.keys() - {"__type", *FLAGS}:
            raise InputFileError(f"{path}: {entry} has the unknown key {short_repr(min(unknown))}")
        flags = {key: value for key, value in token.items() if key != "__type"}
        declared[_id(i)] = catch_panics(functools.partial(tokenizers.AddedToken, **flags), path)
    return declared


def _id(digits: str) -> int:
    """The id in a JSON key; -1 if it is not a token id."""
    return int(digits) if digits.isdecimal() and len(digits) < 10 else -1


def add_affixes(core: tokenizers.Tokenizer, config: Mapping[str, Any], roles: Mapping[str, str]) -> None:
    """Sets the post-processor that transformers builds from add_bos_token and add_eos_token without tokenizer.json."""
    bos, eos = (roles.get(role) if config.get(f"add_{role}") else None for role in ("bos_token", "eos_token"))
    template = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    pairs = [(token, i) for token in {bos, eos} if token and (i := core.token_to_id(token)) is not None]
    core.post_processor = processors.TemplateProcessing(single=template, pair=[*template, "$B:1"], special_tokens=pairs)


def _content(value: object, role: str, path: str) -> str:
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise InputFileError(f"{path}: {role} must be a string, got {short_repr(value)}")
    return content


def check_id(core: tokenizers.Tokenizer, content: str, i: object, path: str) -> None:
    """Raises `InputFileError` if the id `i` that a file gives a token differs from its id in the vocabulary."""
    if not content:
        raise InputFileError(f"{path}: added token '' is empty")
    if (actual := core.token_to_id(content)) != i:
        token = f"added token {short_repr(content)} has id {short_repr(i)}"
        raise InputFileError(f"{path}: {token}, but its id in the vocabulary is {actual}")


def byte_symbols() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary. Source: openai/gpt-2, src/encoder.py."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
