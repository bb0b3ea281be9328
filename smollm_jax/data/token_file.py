"""Prepared data on disk: token files, and sets of them. Imports no framework.

A token file is a folder with `tokens.bin` (uint16, concatenated documents, each ending with eos), `documents.bin`
(uint64, the end index of each document) and `tokens.json` (counts, sha256 of both files and of the tokenizer). A set is
a folder of token files with a `manifest.json`. A document too long for one file is spread over several files, which
contain nothing else and only the last of which ends with eos.
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
MAX_MANIFEST = 256 << 20  # bytes; each token file adds 400
MAX_VERIFIED = 1 << 30  # bytes; a larger set is verified on demand only


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """An opened token file: memory maps, and fields of its sidecar `tokens.json`."""

    path: Path
    tokens: np.ndarray
    ends: np.ndarray  # the end index of each document
    sha256: str
    tokenizer_sha256: str
    eos_token_id: int | None
    largest_id: int  # checked when opened: JAX raises no error for an id beyond the embedding

    @classmethod
    def open(cls, folder: Path) -> "TokenFile":
        """Opens a folder; raises `InputFileError` if a file does not have the size that its sidecar implies."""
        path = folder / "tokens.bin"
        sidecar = _read(folder / "tokens.json", _SIDECAR, "the sidecar of a token file")
        size, documents = file_size(path), folder / "documents.bin"
        if size != 2 * sidecar["tokens"] or not size:
            raise InputFileError(
                f"{path}: has {size} bytes, not 2 for each of the {sidecar['tokens']} tokens in its tokens.json"
            )
        if (size := file_size(documents)) != 8 * sidecar["documents"] or not size:
            raise InputFileError(
                f"{documents}: has {size} bytes, not 8 for each of the {sidecar['documents']} documents in tokens.json"
            )
        tokens, ends = np.memmap(path, np.uint16, "r"), np.memmap(documents, np.uint64, "r")
        names = ("sha256", "tokenizer_sha256", "eos_token_id", "largest_id")
        return cls(path, tokens, ends, *(sidecar[name] for name in names))

    def verify(self) -> None:
        """Reads every byte; raises `InputFileError` if one differs from what was written."""
        sidecar_path = self.path.with_name("tokens.json")
        sidecar = _read(sidecar_path, _SIDECAR, "the sidecar of a token file")
        for name, key in (("tokens.bin", "sha256"), ("documents.bin", "documents_sha256")):
            path = self.path.with_name(name)
            if (digest := sha256_of(path)) != sidecar[key]:
                raise InputFileError(
                    f"{path}: is damaged: its sha256 is {digest[:12]}, but tokens.json has {sidecar[key][:12]}"
                )
        if not np.all(self.ends[:-1] < self.ends[1:]) or self.ends[-1] != len(self.tokens):
            raise InputFileError(
                f"{self.path.with_name('documents.bin')}: document ends must increase up to the number of tokens"
            )
        if (largest := int(self.tokens.max())) != self.largest_id:
            raise InputFileError(f"{sidecar_path}: largest_id is {self.largest_id}, but the largest token is {largest}")

    def check(self, tokenizer: Tokenizer, folder: Path, tokenizer_sha256: str) -> None:
        """Raises `InputFileError` if the file was made with another tokenizer, or has an id beyond the vocabulary."""
        if self.tokenizer_sha256 != tokenizer_sha256:
            raise InputFileError(f"{self.path.parent}: was prepared with another tokenizer than {folder}")
        if self.eos_token_id != tokenizer.eos_token_id:
            raise InputFileError(
                f"{self.path.parent}: ends its documents with token {self.eos_token_id}, but the eos token of {folder} "
                f"is {tokenizer.eos_token_id}: give the text itself as --data, or prepare it with --tokenizer {folder}"
            )
        if self.largest_id >= tokenizer.vocab_size:
            index = int(np.argmax(self.tokens >= tokenizer.vocab_size))
            self.raise_out_of_vocabulary(index, tokenizer.vocab_size)

    def raise_out_of_vocabulary(self, index: int, vocab_size: int) -> None:
        """Raises `InputFileError` for the token at `index`, which is not in the vocabulary."""
        raise InputFileError(
            f"{self.path}: token {index} is {self.tokens[index]}, but the largest id of the vocabulary is "
            f"{vocab_size - 1}"
        )


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """The token files of a folder, in order."""

    path: Path
    files: tuple[TokenFile, ...]
    verified: bool = True  # whether every byte was read and hashed; see `MAX_VERIFIED`
    special_tokens: bool = False  # whether special tokens in the text were parsed

    @classmethod
    def open(cls, folder: Path) -> "TokenSet":
        """Opens a set, or a single token file; raises `InputFileError` if it differs from its manifest."""
        manifest, special_tokens = folder / MANIFEST, False
        if not manifest.is_file():
            files = [TokenFile.open(folder)]
        else:
            content = _read(manifest, _MANIFEST, "the manifest of a data set")
            if content.pop("manifest_sha256", None) not in (None, _digest(content)):
                raise InputFileError(f"{manifest}: has changed since it was written: manifest_sha256 differs")
            entries, special_tokens = content["files"], content.get("special_tokens") is True
            files = [TokenFile.open(folder / _folder_name(entry, manifest)) for entry in entries]
            if not files:
                raise InputFileError(f"{manifest}: files must list at least one token file")
            for entry, file in zip(entries, files, strict=True):
                if (entry.get("sha256"), entry.get("tokens")) != (file.sha256, len(file.tokens)):
                    raise InputFileError(f"{file.path}: differs from its entry in {manifest}")
        verified = sum(2 * len(file.tokens) for file in files) < MAX_VERIFIED
        for file in files if verified else ():
            file.verify()
        return cls(folder, tuple(files), verified, special_tokens)

    @functools.cached_property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(len(file.tokens) for file in self.files)

    @functools.cached_property
    def documents(self) -> int:
        """The number of documents."""
        return sum(len(file.ends) for file in self.files)


def write_token_file(
    folder: Path, documents: Sequence[np.ndarray], metadata: dict[str, Any], seed: Sequence[int]
) -> None:
    """Writes a token file of documents (uint16, eos included), complete or not at all.

    Shuffles the documents, so that the end of the file, which is held out for validation, is a fair sample of them.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    tokens = np.concatenate([documents[i] for i in order])
    ends = np.cumsum([len(documents[i]) for i in order], dtype=np.uint64)
    contents = {"tokens.bin": tokens.astype("<u2").tobytes(), "documents.bin": ends.astype("<u8").tobytes()}
    digests = [hashlib.sha256(content).hexdigest() for content in contents.values()]
    sidecar = {"format": FORMAT, "tokens": len(tokens), "documents": len(documents), "largest_id": int(tokens.max())}
    sidecar |= {"sha256": digests[0], "documents_sha256": digests[1]} | metadata
    with replacing(folder) as temporary:
        temporary.mkdir()
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        (temporary / "tokens.json").write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")


def write_manifest(folder: Path, names: Sequence[str], metadata: dict[str, Any]) -> None:
    """Writes the manifest of a set of token files, the folders `names` in `folder`."""
    files = [TokenFile.open(folder / name) for name in names]
    entries = [
        {"name": name, "tokens": len(file.tokens), "documents": len(file.ends), "sha256": file.sha256}
        for name, file in zip(names, files, strict=True)
    ]
    totals = {name: sum(entry[name] for entry in entries) for name in ("tokens", "documents")}
    with replacing(folder / MANIFEST) as temporary:
        content = {"format": FORMAT} | totals | metadata | {"files": entries}
        content["manifest_sha256"] = _digest(content)
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _digest(manifest: dict[str, Any]) -> str:
    """The sha256 of a manifest's other fields, so that a changed, missing or additional one is noticed."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


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
        raise InputFileError(f"{path}: has an older format than {FORMAT}: prepare it again from its text")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputFileError(f"{path}: is not {what} ({FORMAT})")
    if missing := [key for key in fields if key not in content]:
        raise InputFileError(f"{path}: lacks {', '.join(missing)}")
    for key, (expected_type, expected) in fields.items():
        value = content[key]
        valid = type(value) is expected_type
        if valid and expected_type is int:
            valid = value >= 0
        elif valid and expected_type is str:
            valid = re.fullmatch("[0-9a-f]{64}", value) is not None
        if not valid:
            raise InputFileError(f"{path}: {key} must be {expected}, got {short_repr(value)}")
    return content


def _folder_name(entry: Any, manifest: Path) -> str:
    name = entry.get("name") if isinstance(entry, dict) else None
    if type(name) is not str or Path(name).name != name or name in ("", ".", ".."):
        raise InputFileError(f"{manifest}: files: {short_repr(entry)} does not name a folder next to the manifest")
    return name
