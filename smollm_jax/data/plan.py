"""The plan of a data set: its sources, the file slices that each work unit reads, and what reveals a changed source.

It depends on the sources and the settings alone, not on the number of processes.
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
from smollm_jax.data.file_types import JSON_LINES, PARQUET, PLAIN, FileType, detect_file_type
from smollm_jax.data.parquet_footer import column_sizes
from smollm_jax.data.prepare_worker import WorkUnit
from smollm_jax.data.text import find_cut
from smollm_jax.data.text_sources import note_of_splits, select_files
from smollm_jax.data.text_tables import open_parquet, text_column_index
from smollm_jax.data.token_file import FORMAT
from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.runtime.atomic import sha256_of
from smollm_jax.tokenizer import Tokenizer

# Incremented when long texts are cut at other positions: an unfinished set counts the chunks that are written.
CUT_VERSION = 2
BYTES_PER_TOKEN = 4  # of English text; decides how many bytes a work unit has
DEFAULTS: dict[str, Any] = {"on_bad_text": "stop", "special_tokens": False}  # settings a plan omits at these values


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the tokens besides the text."""

    tokenizer: Path
    text_column: str = "text"
    shard_tokens: int = 1 << 24
    on_bad_text: Policy = "stop"
    special_tokens: bool = False  # whether special tokens written in a text are parsed, or are plain text


@dataclasses.dataclass(frozen=True)
class BuildPlan:
    """Settings, source files with their size and mtime or sha256, and work units."""

    metadata: dict[str, Any]  # settings that go into the manifest too
    files: dict[str, list[Any]]  # by name: size, and mtime in ns or sha256
    units: list[WorkUnit]
    sources: str  # as the user named them
    tokenizer: Tokenizer
    notes: list[str]  # lines about skipped files, for the user
    kinds: dict[str, str]  # types of files that older versions, which looked at names alone, read as another type

    def content(self) -> dict[str, Any]:
        """The JSON of `plan.json`, where a slice names its file by its index among the files."""
        paths = dict.fromkeys(file for unit in self.units for file, _, _ in unit.slices)
        index = {path: i for i, path in enumerate(paths)}
        units = [[[index[file], start, stop] for file, start, stop in unit.slices] for unit in self.units]
        kinds = {"kinds": self.kinds} if self.kinds else {}
        return {"format": FORMAT, "cuts": CUT_VERSION} | self.metadata | kinds | {"files": self.files, "units": units}


def make_plan(
    sources: Sequence[Path], settings: Settings, *, by_content: bool = False, tokenizer: Tokenizer | None = None
) -> BuildPlan:
    """The plan for some sources.

    A source file is identified by its path, size and mtime; `by_content`, by its name in the source and its sha256.
    `tokenizer` is the one that `settings` names, if the caller has loaded it.
    """
    tokenizer = tokenizer or Tokenizer.load(settings.tokenizer)
    if tokenizer.vocab_size > 1 << 16:
        raise InputFileError(
            f"{settings.tokenizer}: a vocabulary of {tokenizer.vocab_size} does not fit a token file's uint16"
        )
    if tokenizer.eos_token_id is None:
        raise InputFileError(f"{settings.tokenizer}: the tokenizer has no eos token, which must end each document")
    if settings.shard_tokens < 1:
        raise UsageError(f"shard_tokens must be at least 1, got {settings.shard_tokens}")
    optional = {"on_bad_text": settings.on_bad_text, "special_tokens": settings.special_tokens}
    metadata = {
        "tokenizer_sha256": tokenizer.sha256,
        "eos_token_id": tokenizer.eos_token_id,
        "text_column": settings.text_column,
        "shard_tokens": settings.shard_tokens,
        "cut": can_cut(tokenizer, settings.special_tokens),
    } | {name: value for name, value in optional.items() if value != DEFAULTS[name]}
    unit_bytes, notes = settings.shard_tokens * BYTES_PER_TOKEN, []
    files: dict[str, list[Any]] = {}
    kinds: dict[str, str] = {}
    seen: dict[str, str] = {}  # by real path: the path it was first named by
    slices: list[tuple[Path, list[tuple[int, int, int]]]] = []
    single_files = [source for source in sources if source.is_file()]
    if len(single_files) > 1 and (note := note_of_splits("sources", single_files)):
        notes.append(note)
    for source in sources:
        selected = select_files(source, settings.text_column)
        notes += selected.notes
        for file in selected.files:
            name = str(file.relative_to(source) if by_content and source.is_dir() else file)
            name = file.name if by_content and source.is_file() else name
            if (real := os.path.realpath(file)) in seen:
                alias = "" if seen[real] == str(file) else f", also as {seen[real]}"
                raise UsageError(f"{file}: is among the sources twice{alias}")
            seen[real] = str(file)
            file_type, stat = detect_file_type(file), file.stat()
            files[name] = [stat.st_size, sha256_of(file) if by_content else stat.st_mtime_ns]
            if file_type != _file_type_in_older_versions(file):
                kinds[name] = ", ".join(filter(None, file_type))
            slices.append((file, _slices(file, file_type, unit_bytes, metadata)))
    units = _group_into_units(slices, unit_bytes)
    return BuildPlan(metadata, files, units, " ".join(map(str, sources)), tokenizer, notes, kinds)


def _file_type_in_older_versions(file: Path) -> FileType:
    """What versions that knew only these names read a file as: their plan for it may mean another text."""
    name, compressions = file.name.lower(), {".gz": "gzip", ".zst": "zstd"}
    form = JSON_LINES if name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl") else PLAIN
    return FileType(PARQUET, None) if name.endswith(".parquet") else FileType(form, compressions.get(Path(name).suffix))


def can_cut(tokenizer: Tokenizer, special_tokens: bool = False) -> bool:
    """Whether a text may be cut at `text.CUT` without changing its tokens.

    The pre-tokenizer must split as SmolLM2's or GPT-2's does, no added token may contain white space (added tokens
    are matched before pre-tokenization), and no post-processor may add tokens such as BOS to each chunk.
    """
    if tokenizer.prefix_ids or tokenizer.suffix_ids:
        return False
    pre_tokenizer = tokenizer.core.pre_tokenizer
    state = json.loads(pre_tokenizer.__getstate__()) if pre_tokenizer else {}
    *before, last = state.get("pretokenizers", [state])
    byte_level = last.get("type") == "ByteLevel" and last.get("use_regex") and not last.get("add_prefix_space")
    added = tokenizer.core.get_added_tokens_decoder().values()
    matched = [token.content for token in added if special_tokens or not token.special]
    no_white_space = not any(re.search(r"[ \n\t]", token) for token in matched)
    return bool(byte_level) and [step.get("type") for step in before] in ([], ["Digits"]) and no_white_space


def _slices(file: Path, file_type: FileType, max_bytes: int, metadata: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Start, stop and bytes of each slice of a file, none much larger than `max_bytes` where it can be divided."""
    size = file.stat().st_size
    if file_type.form == PARQUET:
        parquet, slices = open_parquet(file), []
        column = text_column_index(parquet, file, metadata["text_column"])
        sizes_of_groups = column_sizes(file, parquet.metadata.num_row_groups, parquet.metadata.num_columns)
        for group, sizes in enumerate(sizes_of_groups):
            group_bytes, _ = sizes[column]
            if slices and slices[-1][2] + group_bytes <= max_bytes:
                slices[-1] = (slices[-1][0], group + 1, slices[-1][2] + group_bytes)
            else:
                slices.append((group, group + 1, group_bytes))
        return slices
    bounds = {0, size}
    # A plain text that may be skipped stays in one slice: whether it is skipped is known only at its end.
    undivided = file_type.form == PLAIN and (not metadata["cut"] or metadata.get("on_bad_text") == "skip")
    if file_type.divisible and not undivided:
        bounds |= {find_cut(file, file_type, at) for at in range(max_bytes, size, max_bytes)}
    return [(start, stop, stop - start) for start, stop in itertools.pairwise(sorted(bounds))]


def _group_into_units(files: list[tuple[Path, list[tuple[int, int, int]]]], max_bytes: int) -> list[WorkUnit]:
    """Each slice of a divided file is a unit; undivided files share a unit up to `max_bytes`."""
    groups: list[list[tuple[str, int, int, int]]] = [[]]
    for file, slices in files:
        for file_slice in slices:
            if len(slices) > 1 or sum(size for *_, size in groups[-1]) + file_slice[2] > max_bytes:
                groups.append([])
            groups[-1].append((str(file), *file_slice))
            if len(slices) > 1:
                groups.append([])
    return [
        WorkUnit(number, [group_slice[:3] for group_slice in group], [size for *_, size in group])
        for number, group in enumerate(filter(None, groups))
    ]
