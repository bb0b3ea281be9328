"""Reads the files of a tokenizer folder: a tokenizer with transformers' ids that loses no text, or a one-line error."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from smollm_jax.errors import InputFileError, short_repr
from smollm_jax.runtime.files import MAX_BYTES as MAX_JSON
from smollm_jax.runtime.files import parse_json, reject_bom
from smollm_jax.runtime.panics import catch_panics
from smollm_jax.tokenizer.special_tokens import (
    add_affixes,
    add_tokens,
    byte_symbols,
    check_id,
    special_affixes,
    special_roles,
)

Files = Mapping[str, bytes]

MAX_BYTES = 32 << 20  # of tokenizer.json; SmolLM2's has 3.4 MB, one with 262,144 entries 33 MB
PROBE = "a  B\n\t12 é "
# Classes that transformers 5 builds from vocab.json and merges.txt as it builds GPT-2's.
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")


@dataclasses.dataclass(frozen=True)
class TokenizerFolder:
    """The content of a tokenizer's files. `roles` are the special tokens by name, such as `bos_token`."""

    core: tokenizers.Tokenizer
    config: dict[str, Any]
    roles: dict[str, str]


def read_folder(files: Files, where: str) -> TokenizerFolder:
    """The tokenizer in the contents of files by name; `where` is the folder or the GGUF, for error messages.

    Raises `InputFileError` if a file is malformed or the tokenizer would lose text. Without a tokenizer.json,
    vocab.json and merges.txt are read as transformers' GPT2Tokenizer does, except for digits (`_from_vocabulary`).
    """
    config, path = json_of(files, "tokenizer_config.json", where), f"{where}/tokenizer.json"
    if "tokenizer.json" in files:
        core = _from_json(text_of(files, "tokenizer.json", where, MAX_BYTES), path)
    elif "vocab.json" in files and "merges.txt" in files:
        core, path = _from_vocabulary(files, config, where), f"{where}/vocab.json"
    else:
        raise InputFileError(
            f"{path}: no such file, and no vocab.json with merges.txt either; "
            "`python scripts/fetch_assets.py tokenizer` fetches SmolLM2's"
        )
    legacy = {} if "added_tokens_decoder" in config else json_of(files, "special_tokens_map.json", where)
    roles = special_roles(core, config, legacy, where)
    # transformers disables both, so they change no id.
    core.no_truncation()
    core.no_padding()
    add_tokens(core, config | legacy, json_of(files, "added_tokens.json", where), roles, where)
    if "tokenizer.json" not in files:
        add_affixes(core, config, roles)
    _check(core, path)
    return TokenizerFolder(core, config, roles)


def text_of(files: Files, name: str, where: str, limit: int = MAX_JSON) -> str:
    """The UTF-8 text of one of the files; `InputFileError` if it is too large or not UTF-8."""
    content, path = files[name], f"{where}/{name}"
    if len(content) > limit:
        raise InputFileError(f"{path}: too large: {len(content):,} bytes, at most {limit:,} are read")
    reject_bom(content[:4096], Path(path))
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputFileError(f"{path}: byte {error.start} is not UTF-8") from error


def json_of(files: Files, name: str, where: str, limit: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in one of the files; empty if there is no such file."""
    if name not in files:
        return {}
    values = parse_json(text_of(files, name, where, limit), f"{where}/{name}")
    if not isinstance(values, dict):
        raise InputFileError(f"{where}/{name}: not a JSON object")
    return values


def _from_json(text: str, path: str) -> tokenizers.Tokenizer:
    values = parse_json(text, path)
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict):
        raise InputFileError(f"{path}: not a readable tokenizer: has no model")
    # Each of these silently changes a text or splits it at random. They are refused before `tokenizers` reads them,
    # because with one kind of normalizer it allocates a length given in the file and aborts the process.
    fields = {"normalizer": _effective(values.get("normalizer"))}
    names = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    fields |= {f"model.{name}": model.get(name) for name in names}
    for name, value in fields.items():
        if value:
            raise InputFileError(f"{path}: {name} is {short_repr(value)}, but must be null, as it changes the text")
    decoder = values.get("decoder")
    if model.get("type", "BPE") != "BPE" or not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise InputFileError(f"{path}: not a byte-level BPE: model must be of type BPE and decoder of type ByteLevel")
    core = catch_panics(lambda: tokenizers.Tokenizer.from_str(text), path)
    if not isinstance(core.model, models.BPE):  # `tokenizers` guesses a missing type
        raise InputFileError(f"{path}: not a byte-level BPE: model must be of type BPE")
    if len(set(model["vocab"].values())) != len(model["vocab"]):
        raise InputFileError(f"{path}: model.vocab has two entries with the same id")
    for token in values.get("added_tokens") or []:
        check_id(core, token["content"], token["id"], path)
    return core


def _effective(normalizer: object) -> object:
    """The normalizer, or None if it is an empty sequence."""
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        steps = normalizer.get("normalizers")
        if isinstance(steps, list) and not any(map(_effective, steps)):
            return None
    return normalizer


def _from_vocabulary(files: Files, config: Mapping[str, Any], where: str) -> tokenizers.Tokenizer:
    """A byte-level BPE of vocab.json and merges.txt.

    transformers 5.23 pre-tokenizes text as GPT-2 does. A vocabulary without merges of digits, such as SmolLM2's, was
    trained with digits split one by one, so they are split here as well. Only runs of white space before a digit get
    other ids than transformers gives for the same two files.
    """
    path, name = f"{where}/tokenizer_config.json", config.get("tokenizer_class")
    if name not in GPT2_CLASSES or config.get("add_prefix_space"):
        setting = f"tokenizer_class {short_repr(name)}" if name not in GPT2_CLASSES else "add_prefix_space"
        raise InputFileError(f"{path}: {setting} is not supported with vocab.json and merges.txt: add tokenizer.json")
    vocabulary = json_of(files, "vocab.json", where, MAX_BYTES)
    if len(set(map(str, vocabulary.values()))) != len(vocabulary):
        raise InputFileError(f"{where}/vocab.json: has two entries with the same id")
    lines = text_of(files, "merges.txt", where, MAX_BYTES).replace("\r\n", "\n").split("\n")
    merges = [(i, line.split(" ")) for i, line in enumerate(lines, 1) if line and not line.startswith("#version")]
    for i, pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            merge = short_repr(" ".join(pair))
            raise InputFileError(
                f"{where}/merges.txt, line {i}: {merge} does not join two entries of vocab.json to a third"
            )
    pairs = [(left, right) for _, (left, right) in merges]
    core = tokenizers.Tokenizer(catch_panics(lambda: models.BPE(vocab=vocabulary, merges=pairs), f"{where}/vocab.json"))
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if not any(re.search("[0-9]", left + right) for left, right in pairs):
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    return core


def _check(core: tokenizers.Tokenizer, path: str) -> None:
    """Raises `InputFileError` unless decoding gives back the encoded text."""
    for token in core.get_added_tokens_decoder().values():
        # Special tokens are parsed only on request, so they do not strip plain text.
        if (token.lstrip or token.rstrip) and not token.special:
            raise InputFileError(f"{path}: added token {short_repr(token.content)} strips the text around it")
    vocabulary = core.get_vocab(with_added_tokens=False)
    has_all_symbols = all(symbol in vocabulary for symbol in map(byte_symbols().__getitem__, PROBE.encode()))
    ids = catch_panics(lambda: core.encode(PROBE, add_special_tokens=False).ids, path)
    if has_all_symbols and core.decode(ids, skip_special_tokens=False) != PROBE:
        raise InputFileError(f"{path}: does not decode to the text that was encoded: check pre_tokenizer and decoder")
    catch_panics(lambda: special_affixes(core), path)
