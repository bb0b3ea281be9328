"""What is to be done to prepare a data set: the sources, what of them is read at a time, and what tells a changed one.

It depends on the sources and the settings alone, not on how many work on it.
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smollm_jax.data.bad_text import Policy
from smollm_jax.data.prepare_worker import Unit
from smollm_jax.data.text import border
from smollm_jax.data.text_kinds import JSON_LINES, PARQUET, PLAIN, Kind, kind_of
from smollm_jax.data.text_sources import choose, note_of_splits
from smollm_jax.data.text_tables import parquet, text_column
from smollm_jax.data.token_file import FORMAT
from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.runtime.atomic import sha256_of
from smollm_jax.tokenizer import Tokenizer

CUTS = 2  # raised when a long text is cut elsewhere than before: a begun set counts the passages that are in it
BYTES_PER_TOKEN = 4  # of English text; decides how much text a unit is
# What a plan means that does not say it: it was made before there was the choice, or without it.
DEFAULTS: dict[str, Any] = {"on_bad_text": "stop", "special_tokens": False}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the tokens, next to the text."""

    tokenizer: Path
    text_column: str = "text"
    shard_tokens: int = 1 << 24
    on_bad_text: Policy = "stop"
    special_tokens: bool = False  # whether one that is written in a text is one, and no plain text


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings, source files by name, each with its size and what tells a changed one, and the units of work."""

    about: dict[str, Any]
    files: dict[str, list[Any]]
    units: list[Unit]
    sources: str  # as they were named
    tokenizer: Tokenizer
    notes: list[str]  # what to say of the files that are left out
    kinds: dict[str, str]  # of files that are not read as a version would that knew them by name alone

    def content(self) -> dict[str, Any]:
        """The JSON that is kept; a part's file by its place among the files."""
        found = dict.fromkeys(file for unit in self.units for file, _, _ in unit.parts)
        places = {file: place for place, file in enumerate(found)}
        units = [[[places[file], start, stop] for file, start, stop in unit.parts] for unit in self.units]
        kinds = {"kinds": self.kinds} if self.kinds else {}
        return {"format": FORMAT, "cuts": CUTS} | self.about | kinds | {"files": self.files, "units": units}


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
    given = {"on_bad_text": settings.on_bad_text, "special_tokens": settings.special_tokens}
    about = {
        "tokenizer_sha256": tokenizer.sha256,
        "eos_token_id": tokenizer.eos_token_id,
        "text_column": settings.text_column,
        "shard_tokens": settings.shard_tokens,
        "cut": may_cut(tokenizer, settings.special_tokens),
    } | {name: value for name, value in given.items() if value != DEFAULTS[name]}
    most, notes = settings.shard_tokens * BYTES_PER_TOKEN, []
    files: dict[str, list[Any]] = {}
    kinds: dict[str, str] = {}
    places: dict[str, str] = {}
    found: list[tuple[Path, list[tuple[int, int, int]]]] = []
    named = [source for source in sources if source.is_file()]
    if len(named) > 1 and (note := note_of_splits("sources", named)):
        notes.append(note)
    for source in sources:
        chosen = choose(source, settings.text_column)
        notes += chosen.notes
        for file in chosen.files:
            name = str(file.relative_to(source) if by_content and source.is_dir() else file)
            name = file.name if by_content and source.is_file() else name
            if (real := os.path.realpath(file)) in places:
                also = "" if places[real] == str(file) else f", as {places[real]} too"
                raise UsageError(f"{file}: is among the sources twice{also}")
            places[real] = str(file)
            kind, stat = kind_of(file), file.stat()
            files[name] = [stat.st_size, sha256_of(file) if by_content else stat.st_mtime_ns]
            if kind != _by_older_rules(file):
                kinds[name] = ", ".join(filter(None, kind))
            found.append((file, _parts(file, kind, most, about)))
    return Plan(about, files, _units(found, most), " ".join(map(str, sources)), tokenizer, notes, kinds)


def _by_older_rules(file: Path) -> Kind:
    """What a file was to the versions that went by these names alone: a plan of theirs may mean other text."""
    name, packings = file.name.lower(), {".gz": "gzip", ".zst": "zstd"}
    form = JSON_LINES if name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl") else PLAIN
    return Kind(PARQUET, None) if name.endswith(".parquet") else Kind(form, packings.get(Path(name).suffix))


def may_cut(tokenizer: Tokenizer, special_tokens: bool = False) -> bool:
    """Whether `text.CUT` fits a tokenizer: it splits as SmolLM2's or GPT-2's does, before anything is merged.

    Nor may it cut an added token in two: one of words, which is found in a text before that is split. A text that has
    tokens put around it (BOS) is one text.
    """
    if tokenizer.prefix_ids or tokenizer.suffix_ids:
        return False
    splits = tokenizer.core.pre_tokenizer
    kind = json.loads(splits.__getstate__()) if splits else {}
    *before, last = kind.get("pretokenizers", [kind])
    byte_level = last.get("type") == "ByteLevel" and last.get("use_regex") and not last.get("add_prefix_space")
    added = tokenizer.core.get_added_tokens_decoder().values()
    whole = [token.content for token in added if special_tokens or not token.special]
    cuttable = not any(re.search(r"[ \n\t]", token) for token in whole)
    return bool(byte_level) and [step.get("type") for step in before] in ([], ["Digits"]) and cuttable


def _parts(file: Path, kind: Kind, most: int, about: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Start, stop and bytes of each part of a file: as many as it takes for none to be larger than about `most`."""
    size = file.stat().st_size
    if kind.form == PARQUET:
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
    # A plain text that may be left out is whole: its end decides about its beginning.
    undivided = kind.form == PLAIN and (not about["cut"] or about.get("on_bad_text") == "skip")
    if kind.divisible and not undivided:
        borders |= {border(file, kind, at) for at in range(most, size, most)}
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
