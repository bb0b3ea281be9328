"""Text to a token file, and a token file to batches. NumPy only.

A token file is a folder with `tokens.bin` (uint16, documents one after another, each ended by eos) and `tokens.json`
(how many, their sha256, the tokenizer's). A batch is a pure function of (recipe, step): there is no reader state to
save or to lose.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from smollm_jax.config import shown
from smollm_jax.errors import InputFileError, StorageError, UsageError
from smollm_jax.files import read_json, size_of
from smollm_jax.formats import replacing
from smollm_jax.recipe import Recipe
from smollm_jax.text import documents, text_files
from smollm_jax.tokenizer import Tokenizer

FORMAT = "smollm-tokens-1"
DOCUMENTS_AT_ONCE = 256  # one call into the tokenizer, which spreads them over all cores


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """An opened token file: a memory map and what its sidecar says."""

    path: Path
    tokens: np.ndarray
    sha256: str
    tokenizer_sha256: str
    documents: int
    eos_token_id: int | None

    @classmethod
    def open(cls, folder: Path) -> "TokenFile":
        """Opens a prepared folder; raises `InputFileError` if its content is not what its sidecar says."""
        about = folder / "tokens.json"
        sidecar = read_json(about)
        if not isinstance(sidecar, dict) or sidecar.get("format") != FORMAT:
            raise InputFileError(f"{about}: is not the sidecar of a token file ({FORMAT})")
        if missing := [key for key in _SIDECAR if key not in sidecar]:
            raise InputFileError(f"{about}: lacks {', '.join(missing)}")
        for key, (kind, what) in _SIDECAR.items():
            value = sidecar[key]
            if type(value) is not kind or (value < 0 if kind is int else not re.fullmatch("[0-9a-f]{64}", value)):
                raise InputFileError(f"{about}: {key} must be {what}, got {shown(value)}")
        path = folder / "tokens.bin"
        size = size_of(path)
        if size != 2 * sidecar["tokens"] or not size:
            raise InputFileError(f"{path}: has {size} bytes, its tokens.json says {sidecar['tokens']} tokens of 2")
        if (found := sha256_of(path)) != sidecar["sha256"]:
            raise InputFileError(f"{path}: has sha256 {found[:12]}, its tokens.json says {sidecar['sha256'][:12]}")
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        return cls(
            path, tokens, sidecar["sha256"], sidecar["tokenizer_sha256"], sidecar["documents"], sidecar["eos_token_id"]
        )

    @functools.cached_property
    def largest_id(self) -> int:
        """The largest token id in the file: JAX reads past the end of an embedding without an error."""
        return int(self.tokens.max())

    def check(self, tokenizer: Tokenizer, tokenizer_folder: Path) -> "TokenFile":
        """Itself; raises `InputFileError` when it was made with another tokenizer or has ids the tokenizer has not."""
        if self.tokenizer_sha256 != sha256_of(tokenizer_folder / "tokenizer.json"):
            raise InputFileError(f"{self.path.parent}: was prepared with another tokenizer than {tokenizer_folder}")
        if self.eos_token_id != tokenizer.eos_token_id:
            raise InputFileError(
                f"{self.path.parent}: ends its documents with token {self.eos_token_id}, {tokenizer_folder} "
                f"with {tokenizer.eos_token_id}"
            )
        if self.largest_id >= tokenizer.vocab_size:
            place = int(np.argmax(self.tokens >= tokenizer.vocab_size))
            raise InputFileError(
                f"{self.path}: token {place} is {self.tokens[place]}, the vocabulary ends at {tokenizer.vocab_size - 1}"
            )
        return self


_SIDECAR: dict[str, tuple[type, str]] = {
    "tokens": (int, "a count"),
    "documents": (int, "a count"),
    "eos_token_id": (int, "a token id"),
    "sha256": (str, "64 hexadecimal digits"),
    "tokenizer_sha256": (str, "64 hexadecimal digits"),
}


def prepare(source: Path, tokenizer_folder: Path, cache: Path, tokenizer: Tokenizer | None = None) -> TokenFile:
    """The token file of a source: text file, folder of text, JSONL with a "text" field, or a prepared token file.

    A text source is tokenised once and kept under `cache`, by the hash of its content and of the tokenizer, which is
    loaded from its folder unless it is at hand.
    """
    if source.name == "tokens.bin":
        source = source.parent
    tokenizer = tokenizer or Tokenizer.load(tokenizer_folder)
    if (source / "tokens.json").is_file():
        return TokenFile.open(source).check(tokenizer, tokenizer_folder)
    files = text_files(source)
    tokenizer_sha256 = sha256_of(tokenizer_folder / "tokenizer.json")
    digest = hashlib.sha256(f"{tokenizer_sha256} {tokenizer.eos_token_id}".encode())
    for file in files:
        digest.update(f"{file.relative_to(source)}\0{sha256_of(file)}\0".encode())
    target = cache / f"{source.stem}-{digest.hexdigest()[:12]}"
    if not (target / "tokens.json").is_file():
        try:
            with replacing(target) as temporary:
                _tokenize(files, source, tokenizer, tokenizer_sha256, temporary)
        except (StorageError, UsageError):
            if not (target / "tokens.json").is_file():  # else another process was faster, with the same tokens
                raise
    return TokenFile.open(target).check(tokenizer, tokenizer_folder)


def _tokenize(files: list[Path], source: Path, tokenizer: Tokenizer, tokenizer_sha256: str, folder: Path) -> None:
    if tokenizer.vocab_size > 1 << 16:
        raise InputFileError(f"{source}: a vocabulary of {tokenizer.vocab_size} does not fit a token file's uint16")
    if tokenizer.eos_token_id is None:
        raise InputFileError(f"{source}: the tokenizer names no eos token to end a document with")
    folder.mkdir()
    # Shuffled once, so that the tail that is held out for validation is a fair sample of the documents.
    texts = []
    for file in files:
        for number, text in enumerate(documents(file), 1):
            if reason := tokenizer.unencodable(text):
                raise InputFileError(f"{file}: document {number} cannot be encoded: {reason}")
            texts += [text] if text else []
    order = np.random.default_rng(0).permutation(len(texts))
    digest, count = hashlib.sha256(), 0
    with (folder / "tokens.bin").open("wb") as out:
        for start in range(0, len(texts), DOCUMENTS_AT_ONCE):
            batch = tokenizer.encode_batch([texts[i] for i in order[start : start + DOCUMENTS_AT_ONCE]])
            block = np.concatenate([[*ids, tokenizer.eos_token_id] for ids in batch]).astype(np.uint16).tobytes()
            digest.update(block)
            count += len(block) // 2
            out.write(block)
    if not count:
        raise InputFileError(f"{source}: holds no text")
    sidecar = {
        "format": FORMAT,
        "tokens": count,
        "sha256": digest.hexdigest(),
        "tokenizer_sha256": tokenizer_sha256,
        "eos_token_id": tokenizer.eos_token_id,
        "documents": len(texts),
        "source": source.name,
    }
    (folder / "tokens.json").write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hex."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read: {error}") from error


class Batches:
    """Batches of a token file under a recipe: windows of T + 1 tokens, T apart, each seen once an epoch.

    The last `validation_fraction` of the tokens, at least one window, is held out.
    """

    def __init__(self, file: TokenFile, recipe: Recipe):
        self.recipe = recipe
        T = recipe.sequence_length
        held_out = max(round(len(file.tokens) * recipe.validation_fraction), T + 1)
        self._train = file.tokens[: max(len(file.tokens) - held_out, 0)]
        self._validation = file.tokens[len(self._train) :]
        self.windows = max(len(self._train) - 1, 0) // T
        self.validation_windows = max(len(self._validation) - 1, 0) // T
        if not self.windows or not self.validation_windows:
            raise InputFileError(
                f"{file.path}: {len(file.tokens)} tokens are too few for one training and one held-out "
                f"sequence of {T}: shorten --sequence-length or give more text"
            )

    def batch(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """The tokens `[B, T + 1]`, int32, of a step (0 = the first), or of some of its rows.

        Inputs are all but the last of each row, targets all but the first.
        """
        return _windows(self._train, self.windows_of(step)[rows], self.recipe.sequence_length)

    def windows_of(self, step: int) -> list[int]:
        """Which windows of the training tokens a step's batch is made of."""
        first = step * self.recipe.batch_size
        places = [divmod(i, self.windows) for i in range(first, first + self.recipe.batch_size)]
        return [int(self._order(epoch)[index]) for epoch, index in places]

    def validation(self, batches: int) -> Iterator[np.ndarray]:
        """Up to `batches` batches of held-out tokens, evenly spread over them, the same ones every time."""
        count = min(batches * self.recipe.batch_size, self.validation_windows)
        indices = np.linspace(0, self.validation_windows - 1, count).round().astype(int)
        for start in range(0, count, self.recipe.batch_size):
            part = indices[start : start + self.recipe.batch_size]
            yield _windows(self._validation, list(part), self.recipe.sequence_length)

    @functools.lru_cache(maxsize=2)  # noqa: B019  # a run has one Batches, and a batch touches two epochs at most
    def _order(self, epoch: int) -> np.ndarray:
        """The order of the windows in an epoch, from (seed, epoch) alone."""
        return np.random.default_rng([self.recipe.seed, epoch]).permutation(self.windows)


def _windows(tokens: np.ndarray, indices: list[int], length: int) -> np.ndarray:
    return np.stack([tokens[i * length : (i + 1) * length + 1] for i in indices]).astype(np.int32)
