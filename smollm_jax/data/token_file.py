"""Prepared data on the disk: token files, and sets of them. Imports no framework.

A token file is a folder with `tokens.bin` (uint16, documents one after another, each ended by eos), `documents.bin`
(uint64, where each document ends) and `tokens.json` (the counts, the sha256 of both, the tokenizer's). A set is a
folder of them with a `manifest.json`. A document that is too long for one file is spread over several, which hold
nothing else and only the last of which ends with eos.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax.errors import InputFileError, short_repr
from smollm_jax.runtime.atomic import replacing, sha256_of
from smollm_jax.runtime.files import file_size, read_json
from smollm_jax.tokenizer import Tokenizer

FORMAT = "smollm-tokens-2"
MANIFEST = "manifest.json"
MAX_MANIFEST = 256 << 20  # bytes; a token file takes 400
VERIFIED = 1 << 30  # bytes; a larger set is verified on demand only


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """An opened token file: memory maps and what its sidecar says."""

    path: Path
    tokens: np.ndarray
    ends: np.ndarray  # of the documents
    sha256: str
    tokenizer_sha256: str
    eos_token_id: int | None
    largest_id: int  # JAX reads past the end of an embedding without an error

    @classmethod
    def open(cls, folder: Path) -> "TokenFile":
        """Opens a folder whose files have the sizes its sidecar says, and raises `InputFileError` if they have not."""
        path = folder / "tokens.bin"
        about = _read(folder / "tokens.json", _SIDECAR, "the sidecar of a token file")
        size, documents = file_size(path), folder / "documents.bin"
        if size != 2 * about["tokens"] or not size:
            raise InputFileError(f"{path}: has {size} bytes, its tokens.json says {about['tokens']} tokens of 2")
        if (size := file_size(documents)) != 8 * about["documents"] or not size:
            raise InputFileError(f"{documents}: has {size} bytes, its tokens.json says {about['documents']} ends of 8")
        tokens, ends = np.memmap(path, np.uint16, "r"), np.memmap(documents, np.uint64, "r")
        names = ("sha256", "tokenizer_sha256", "eos_token_id", "largest_id")
        return cls(path, tokens, ends, *(about[name] for name in names))

    def verify(self) -> None:
        """Raises `InputFileError` if a byte is not what was written."""
        about = _read(self.path.with_name("tokens.json"), _SIDECAR, "the sidecar of a token file")
        for name, key in (("tokens.bin", "sha256"), ("documents.bin", "documents_sha256")):
            path = self.path.with_name(name)
            if (found := sha256_of(path)) != about[key]:
                raise InputFileError(f"{path}: has sha256 {found[:12]}, its tokens.json says {about[key][:12]}")
        if not np.all(self.ends[:-1] < self.ends[1:]) or self.ends[-1] != len(self.tokens):
            raise InputFileError(f"{self.path.with_name('documents.bin')}: is no rising list that ends with the tokens")
        if (largest := int(self.tokens.max())) != self.largest_id:
            about = self.path.with_name("tokens.json")
            raise InputFileError(f"{about}: largest_id is {self.largest_id}, the largest token {largest}")

    def check(self, tokenizer: Tokenizer, folder: Path, tokenizer_sha256: str) -> None:
        """Raises `InputFileError` when it was made with another tokenizer or has ids the tokenizer has not."""
        if self.tokenizer_sha256 != tokenizer_sha256:
            raise InputFileError(f"{self.path.parent}: was prepared with another tokenizer than {folder}")
        if self.eos_token_id != tokenizer.eos_token_id:
            ends = f"{self.path.parent}: ends its documents with token {self.eos_token_id}"
            raise InputFileError(f"{ends}, {folder} with {tokenizer.eos_token_id}")
        if self.largest_id >= tokenizer.vocab_size:
            place = int(np.argmax(self.tokens >= tokenizer.vocab_size))
            self.refuse(place, tokenizer.vocab_size)

    def refuse(self, place: int, vocab_size: int) -> None:
        """Raises `InputFileError` for a token that is not in the vocabulary."""
        raise InputFileError(
            f"{self.path}: token {place} is {self.tokens[place]}, the vocabulary ends at {vocab_size - 1}"
        )


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """The token files of a folder, in order."""

    path: Path
    files: tuple[TokenFile, ...]
    verified: bool = True  # whether every byte was; see `VERIFIED`
    special_tokens: bool = False  # whether those that were written in the text are in it

    @classmethod
    def open(cls, folder: Path) -> "TokenSet":
        """Opens a set, or a lone token file; raises `InputFileError` if it is not what its manifest says."""
        manifest, special_tokens = folder / MANIFEST, False
        if not manifest.is_file():
            files = [TokenFile.open(folder)]
        else:
            content = _read(manifest, _MANIFEST, "the manifest of a data set")
            entries, special_tokens = content["files"], content.get("special_tokens") is True
            files = [TokenFile.open(folder / _name(entry, manifest)) for entry in entries]
            if not files:
                raise InputFileError(f"{manifest}: files must name at least one")
            for entry, file in zip(entries, files, strict=True):
                if (entry.get("sha256"), entry.get("tokens")) != (file.sha256, len(file.tokens)):
                    raise InputFileError(f"{file.path}: is not the one that {manifest} names")
        verified = sum(2 * len(file.tokens) for file in files) < VERIFIED
        for file in files if verified else ():
            file.verify()
        return cls(folder, tuple(files), verified, special_tokens)

    @functools.cached_property
    def tokens(self) -> int:
        """How many."""
        return sum(len(file.tokens) for file in self.files)

    @functools.cached_property
    def documents(self) -> int:
        """How many."""
        return sum(len(file.ends) for file in self.files)


def write_token_file(folder: Path, documents: Sequence[np.ndarray], about: dict[str, Any], seed: Sequence[int]) -> None:
    """A whole token file, or none, of documents (uint16, eos included), shuffled by a seed.

    Shuffled so that the tail that is held out for validation is a fair sample of them.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    tokens = np.concatenate([documents[i] for i in order])
    ends = np.cumsum([len(documents[i]) for i in order], dtype=np.uint64)
    contents = {"tokens.bin": tokens.astype("<u2").tobytes(), "documents.bin": ends.astype("<u8").tobytes()}
    digests = [hashlib.sha256(content).hexdigest() for content in contents.values()]
    sidecar = {"format": FORMAT, "tokens": len(tokens), "documents": len(documents), "largest_id": int(tokens.max())}
    sidecar |= {"sha256": digests[0], "documents_sha256": digests[1]} | about
    with replacing(folder) as temporary:
        temporary.mkdir()
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        (temporary / "tokens.json").write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")


def write_manifest(folder: Path, names: Sequence[str], about: dict[str, Any]) -> None:
    """The manifest that makes a set of the token files in a folder."""
    files = [TokenFile.open(folder / name) for name in names]
    entries = [
        {"name": name, "tokens": len(file.tokens), "documents": len(file.ends), "sha256": file.sha256}
        for name, file in zip(names, files, strict=True)
    ]
    totals = {name: sum(entry[name] for entry in entries) for name in ("tokens", "documents")}
    with replacing(folder / MANIFEST) as temporary:
        content = {"format": FORMAT} | totals | about | {"files": entries}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


_SIDECAR: dict[str, tuple[type, str]] = {
    "tokens": (int, "a count"),
    "documents": (int, "a count"),
    "eos_token_id": (int, "a token id"),
    "largest_id": (int, "a token id"),
    "sha256": (str, "64 hexadecimal digits"),
    "documents_sha256": (str, "64 hexadecimal digits"),
    "tokenizer_sha256": (str, "64 hexadecimal digits"),
}
_MANIFEST: dict[str, tuple[type, str]] = {"files": (list, "a list")}


def _read(path: Path, fields: dict[str, tuple[type, str]], what: str) -> dict[str, Any]:
    content = read_json(path, MAX_MANIFEST)
    if isinstance(content, dict) and content.get("format") == "smollm-tokens-1":
        raise InputFileError(f"{path}: is of an older format than {FORMAT}: prepare it again from its text")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputFileError(f"{path}: is not {what} ({FORMAT})")
    if missing := [key for key in fields if key not in content]:
        raise InputFileError(f"{path}: lacks {', '.join(missing)}")
    for key, (kind, expected) in fields.items():
        value = content[key]
        wrong = (
            (kind is int and value < 0) or (kind is str and not re.fullmatch("[0-9a-f]{64}", value))
            if type(value) is kind
            else True
        )
        if wrong:
            raise InputFileError(f"{path}: {key} must be {expected}, got {short_repr(value)}")
    return content


def _name(entry: Any, manifest: Path) -> str:
    name = entry.get("name") if isinstance(entry, dict) else None
    if type(name) is not str or Path(name).name != name or name in ("", ".", ".."):
        raise InputFileError(f"{manifest}: files: {short_repr(entry)} names no folder in it")
    return name
