"""What is to be done to prepare a data set: the sources, what of them is read at a time, and what tells a changed one.

It depends on the sources and the settings alone, not on how many work on it.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.prepare_worker import Unit
from smollm_jax.text import border, is_jsonl, is_packed, is_parquet, parquet, text_column, text_files
from smollm_jax.token_file import FORMAT, sha256_of
from smollm_jax.tokenizer import Tokenizer

CUTS = 2  # raised when a long text is cut elsewhere than before: a begun set counts the passages that are in it
BYTES_PER_TOKEN = 4  # of English text; decides how much text a unit is


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the tokens, next to the text."""

    tokenizer: Path
    text_column: str = "text"
    shard_tokens: int = 1 << 24


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings, source files by name, each with its size and what tells a changed one, and the units of work."""

    about: dict[str, Any]
    files: dict[str, list[Any]]
    units: list[Unit]
    sources: str  # as they were named
    tokenizer: Tokenizer

    def content(self) -> dict[str, Any]:
        """The JSON that is kept; a part's file by its place among the files."""
        found = dict.fromkeys(file for unit in self.units for file, _, _ in unit.parts)
        places = {file: place for place, file in enumerate(found)}
        units = [[[places[file], start, stop] for file, start, stop in unit.parts] for unit in self.units]
        return {"format": FORMAT, "cuts": CUTS} | self.about | {"files": self.files, "units": units}


def make_plan(
    sources: Sequence[Path], settings: Settings, *, by_content: bool = False, tokenizer: Tokenizer | None = None
) -> Plan:
    """The plan for some sources; a changed file is told by its time or `by_content`, and then wherever it lies.

    `tokenizer` is the settings', where it was loaded before.
    """
    tokenizer = tokenizer or Tokenizer.load(settings.tokenizer)
    if tokenizer.vocab_size > 1 << 16:
        size = f"a vocabulary of {tokenizer.vocab_size}"
        raise InputFileError(f"{settings.tokenizer}: {size} does not fit a token file's uint16")
    if tokenizer.eos_token_id is None:
        raise InputFileError(f"{settings.tokenizer}: the tokenizer names no eos token to end a document with")
    if settings.shard_tokens < 1:
        raise UsageError(f"shard_tokens must be at least 1, got {settings.shard_tokens}")
    about = {
        "tokenizer_sha256": tokenizer.sha256,
        "eos_token_id": tokenizer.eos_token_id,
        "text_column": settings.text_column,
        "shard_tokens": settings.shard_tokens,
        "cut": may_cut(tokenizer),
    }
    named = " ".join(map(str, sources))
    files: dict[str, list[Any]] = {}
    found: list[Path] = []
    for source in sources:
        for file in text_files(source):
            name = str(file.relative_to(source) if by_content and source.is_dir() else file)
            name = file.name if by_content and source.is_file() else name
            if name in files:
                raise UsageError(f"{file}: is among the sources twice")
            stat = file.stat()
            files[name] = [stat.st_size, sha256_of(file) if by_content else stat.st_mtime_ns]
            found.append(file)
    most = settings.shard_tokens * BYTES_PER_TOKEN
    return Plan(about, files, _units([(file, _parts(file, most, about)) for file in found], most), named, tokenizer)


def may_cut(tokenizer: Tokenizer) -> bool:
    """Whether `text.CUT` fits a tokenizer: it splits as SmolLM2's or GPT-2's does, before anything is merged."""
    splits = tokenizer.core.pre_tokenizer
    kind = json.loads(splits.__getstate__()) if splits else {}
    *before, last = kind.get("pretokenizers", [kind])
    byte_level = last.get("type") == "ByteLevel" and last.get("use_regex") and not last.get("add_prefix_space")
    return bool(byte_level) and [step.get("type") for step in before] in ([], ["Digits"])


def _parts(file: Path, most: int, about: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Start, stop and bytes of each part of a file: as many as it takes for none to be larger than about `most`."""
    size = file.stat().st_size
    if is_parquet(file):
        opened, parts = parquet(file), []
        column = text_column(opened, file, about["text_column"])
        for number in range(opened.metadata.num_row_groups):
            more = opened.metadata.row_group(number).column(column).total_uncompressed_size
            if parts and parts[-1][2] + more <= most:
                parts[-1] = (parts[-1][0], number + 1, parts[-1][2] + more)
            else:
                parts.append((number, number + 1, more))
        return parts
    borders = {0, size}
    if not is_packed(file) and (about["cut"] or is_jsonl(file)):
        borders |= {border(file, at) for at in range(most, size, most)}
    places = sorted(borders)
    return [(start, stop, stop - start) for start, stop in itertools.pairwise(places)]


def _units(files: list[tuple[Path, list[tuple[int, int, int]]]], most: int) -> list[Unit]:
    """Each part of a file that has several is a unit; whole files go together up to `most` bytes."""
    groups: list[list[tuple[str, int, int, int]]] = [[]]
    for file, parts in files:
        for part in parts:
            if len(parts) > 1 or sum(size for *_, size in groups[-1]) + part[2] > most:
                groups.append([])
            groups[-1].append((str(file), *part))
            if len(parts) > 1:
                groups.append([])
    return [
        Unit(number, [part[:3] for part in group], [size for *_, size in group])
        for number, group in enumerate(filter(None, groups))
    ]
