"""Selects the files of a source of text, which is a file, a folder or a glob, and reports the files it skips.

Of a folder it selects the files with a suffix of a text format (`file_types.FORMS`), except hidden files, dataset cards
and other metadata, and only those of the training split. The words that name splits are those of Hugging Face's
datasets (data_files.py, SPLIT_KEYWORDS).
"""

import collections
import csv
import glob
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from smollm_jax.data.compression import open_decompressed
from smollm_jax.data.file_types import ARROW, CSV, FORMS, JSON, PLAIN, TSV, suffixes_of, type_by_name
from smollm_jax.errors import InputFileError
from smollm_jax.runtime.files import one_line

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
SEPARATORS = re.compile(r"[-._ 0-9]+")  # around the word for a split in a name
# Reasons to skip a file, as the user reads them behind their count.
HIDDEN, CARD, LICENCE, METADATA, NOT_TEXT, NOT_A_FILE, DUPLICATE = (
    "hidden",
    "dataset card",
    "licence",
    "metadata of a data set",
    "with another suffix",
    "linked folder or special file",
    "link to a file that is also read",
)
METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
HIDDEN_FOLDERS = ("_delta_log", "_temporary", "@eaDir", "$RECYCLE.BIN")  # besides names that begin with . or __
MAX_NAMES = 3  # that a note shows of the files skipped for one reason


class SelectedFiles(NamedTuple):
    """The files of a source, in order, and notes for the user about skipped ones."""

    files: list[Path]
    notes: list[str]


def text_files(source: Path) -> list[Path]:
    """The files a source consists of, in order: a file, a folder or a glob; `InputFileError` when there are none."""
    return select_files(source).files


def select_files(source: Path, column: str = "text", splits: tuple[str, ...] = ("train",)) -> SelectedFiles:
    """The files of a source, of a data set with splits those of the first split in `splits` that it has.

    Raises `InputFileError` when there is nothing to read.
    """
    if source.is_file():
        return SelectedFiles([source], [])
    if source.is_dir():
        return _from_folder(source, column, splits)
    if re.search(r"[*?\[]", str(source)) and (matches := sorted(glob.glob(str(source), recursive=True))):
        return _from_glob(source, [Path(match) for match in matches], column, splits)
    if source.exists():
        raise InputFileError(f"{source}: is not a regular file, and it must be read twice: save it as a file")
    raise InputFileError(f"{source}: no such file or folder{_download_advice(source)}")


def _download_advice(source: Path) -> str:
    """What to do if a missing path is a URL, or may be the name of a data set on the Hugging Face hub; else ""."""
    if re.match(r"\w+:/", str(source)):
        return ": URLs are not downloaded: download the file and give its path"
    is_hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)) and not type_by_name(source)[0]
    if is_hub_name and not source.parent.exists():
        command = f"hf download --repo-type dataset {source} --local-dir {source.name}"
        return f"; to use a data set of the Hugging Face hub, download it first: {command}"
    return ""


def _from_glob(source: Path, matches: list[Path], column: str, splits: tuple[str, ...]) -> SelectedFiles:
    """The files that match a glob, whatever their names, and the text files of matching folders."""
    duplicates: list[str] = []
    files = dict.fromkeys(
        _without_duplicates(
            [match for match in matches if match.is_file()], lambda _, path: duplicates.append(str(path))
        )
    )
    notes = [f"{source}: skips {_count_and_names(DUPLICATE, duplicates)}"] if duplicates else []
    for match in matches:
        # `folder/**` matches the folders as well as the files in them.
        if match.is_dir() and not any(match in file.parents for file in files):
            selected = _from_folder(match, column, splits)
            files |= dict.fromkeys(selected.files)
            notes += selected.notes
    if not files:
        raise InputFileError(f"{source}: no such file or folder")
    note = note_of_splits(source, list(files))
    return SelectedFiles(list(files), notes + ([note] if note else []))


def note_of_splits(source: object, files: list[Path]) -> str | None:
    """A note if files that the user named one by one, all of which are read, belong to other splits besides train."""
    counts = collections.Counter(split_of(Path(file.name)) for file in files)
    others = [f"{split} ({_plural(counts[split], 'file')})" for split in ("validation", "test") if counts[split]]
    if not counts["train"] or not others:
        return None
    return f"{source}: note: reads every named file, also of other splits: {', '.join(others)}"


def _from_folder(source: Path, column: str, splits: tuple[str, ...]) -> SelectedFiles:
    skipped: dict[str, list[str]] = collections.defaultdict(list)
    files = _walk(source, lambda reason, path: skipped[reason].append(str(path.relative_to(source))))
    has_tables = any(type_by_name(file)[0] not in (PLAIN, None) for file in files)
    selected = []
    for file in files:
        if reason := _metadata_reason(file, has_tables, column):
            skipped[reason].append(str(file.relative_to(source)))
        else:
            selected.append(file)
    tables = [file for file in selected if type_by_name(file)[0] != PLAIN]
    if tables and len(tables) < len(selected) and not any(_may_have_column(file, column) for file in tables):
        skipped[METADATA] += [str(file.relative_to(source)) for file in tables]
        selected = [file for file in selected if file not in tables]
    selected, note = _select_split(source, selected, splits)
    others = ", ".join(_count_and_names(reason, names) for reason, names in skipped.items())
    if not selected:
        suffixes = ", ".join(FORMS)
        only = f"; it has only {others}" if others else ""
        compressed = "or one of these and .gz, .zst, .xz or .bz2"
        raise InputFileError(f"{source}: holds no file with the suffix {suffixes}, {compressed}{only}")
    notes = [f"{source}: reads {_plural(len(selected), 'file')}, skips {others}"] if others else []
    return SelectedFiles(selected, notes + ([note] if note else []))


def _walk(source: Path, skip: Callable[[str, Path], None]) -> list[Path]:
    """The files under a folder whose suffixes are of text formats, in order; calls `skip` with each other one."""

    def raise_error(error: OSError) -> None:
        raise InputFileError(f"{error.filename}: cannot be read: {one_line(error)}") from error

    files = []
    for parent, folders, names in os.walk(source, onerror=raise_error):
        for name in sorted(folders):
            path = Path(parent, name)
            hidden = name.startswith((".", "__")) or name in HIDDEN_FOLDERS
            if hidden or path.is_symlink():
                skip(HIDDEN if hidden else NOT_A_FILE, path)
                folders.remove(name)
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith("."):
                skip(HIDDEN, path)
            elif not type_by_name(path)[0]:
                skip(LICENCE if _is_licence(name) else NOT_TEXT, path)
            elif not path.is_file():  # reading a pipe would block
                skip(NOT_A_FILE, path)
            else:
                files.append(path)
    return _without_duplicates(sorted(files), skip)


def _without_duplicates(files: list[Path], skip: Callable[[str, Path], None]) -> list[Path]:
    """The files, calling `skip` with links to others of them and with all but the first of several links to a file."""
    if not any(file.is_symlink() for file in files):
        return files
    real_paths = {os.path.realpath(file) for file in files if not file.is_symlink()}
    unique = []
    for file in files:
        if not file.is_symlink():
            unique.append(file)
        elif (real := os.path.realpath(file)) in real_paths:
            skip(DUPLICATE, file)
        else:
            real_paths.add(real)
            unique.append(file)
    return unique


def _is_licence(name: str) -> bool:
    return re.fullmatch(r"(?i)(un)?(licen[cs]e|copying|notice)([-._]\w+)*", name) is not None


def _metadata_reason(file: Path, has_tables: bool, column: str) -> str | None:
    """The reason to skip a file that describes a data set, or None; `has_tables`: whether its source has tables."""
    name, form = file.name.lower(), type_by_name(file)[0]
    if form == PLAIN and _is_licence(file.name):
        return LICENCE
    if name in ("readme.md", "readme.txt", "readme.rst") and (has_tables or _has_front_matter(file)):
        return CARD
    if name in METADATA_FILES or (form == JSON and _is_object_without(column, file)):
        return METADATA
    if form == ARROW and name.startswith("cache-"):  # a cache of `datasets`
        return METADATA
    return None


def _has_front_matter(file: Path) -> bool:
    """Whether a Markdown file begins with YAML between two lines of ---, as a dataset card does."""
    with file.open("rb") as raw:
        return re.match(rb"(?:\xef\xbb\xbf)?---\r?\n(?:.*\n)*?---\s", raw.read(1 << 16)) is not None


def _is_object_without(column: str, file: Path) -> bool:
    """Whether a JSON file is a single object that lacks the text column."""
    if suffixes_of(file)[1] or file.stat().st_size > 1 << 20:
        return False
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and column not in value


def _may_have_column(file: Path, column: str) -> bool:
    """Whether the head of a CSV, TSV or JSON file has the text column; True for other tables, whose schema says it."""
    form, compression = type_by_name(file)
    if form not in (CSV, TSV, JSON):
        return True
    with open_decompressed(file, compression) as (stream, _):
        head = stream.read(1 << 16).decode("utf-8-sig", errors="replace")
    if form == JSON:
        return f'"{column}"' in head or re.match(r'\s*\[\s*"', head) is not None
    return column in next(csv.reader(head.splitlines()[:1], delimiter="," if form == CSV else "\t"), [])


# ----------------------------------------------------------------------------------------------------- splits


def split_of(path: Path) -> str | None:
    """The split that a path within a data set names, in its outermost folder that names one, else in its file name."""
    for part in (*path.parts[:-1], path.name):
        for word in SEPARATORS.split(part.lower()):
            if word in SPLIT_OF:
                return SPLIT_OF[word]
    return None


def _select_split(source: Path, files: list[Path], splits: tuple[str, ...]) -> tuple[list[Path], str | None]:
    """The files of the wanted split and of no split, and a note about the other ones.

    A plain text belongs to another split only if a file of the wanted split has the same name except for the word for
    the split: in a folder of essays, test.txt is an essay.
    """
    split_by_file = {file: split_of(file.relative_to(source)) for file in files}
    present = collections.Counter(split_by_file.values())
    wanted = next((split for split in splits if present[split]), None)
    if wanted is None:
        available = " and ".join(sorted(split for split in present if split))
        note = f"{source}: has no {splits[0]} split: reads {available}" if available and not present[None] else None
        return files, note
    patterns = {
        _name_without_split(file.relative_to(source)) for file, split in split_by_file.items() if split == wanted
    }
    selected, others = [], collections.Counter()
    for file, split in split_by_file.items():
        plain = type_by_name(file)[0] == PLAIN
        if split in (None, wanted) or (plain and _name_without_split(file.relative_to(source)) not in patterns):
            selected.append(file)
        else:
            others[str(split)] += 1
    if not others:
        return files, None
    skipped = ", ".join(f"{split} ({_plural(count, 'file')})" for split, count in sorted(others.items()))
    return selected, f"{source}: reads the {wanted} split ({_plural(len(selected), 'file')}), skips {skipped}"


def _name_without_split(path: Path) -> tuple[str, ...]:
    """The words of a path that do not depend on the split and the shard number."""
    by_folder = split_of(path.parent / "_") is not None
    words = SEPARATORS.split(str(path.parent if by_folder else path).lower())
    suffixes = {suffix.lstrip(".") for suffix in suffixes_of(path)}
    parts = (part for word in words for part in word.split(os.sep))
    return tuple(part for part in parts if part and part not in SPLIT_OF and part not in ("of", *suffixes))


def _count_and_names(reason: str, names: list[str]) -> str:
    """The number of files skipped for a reason and the first names, or suffixes where these are the reason."""
    if reason == NOT_TEXT:
        suffixes = collections.Counter(Path(name).suffix.lower() or Path(name).name for name in names)
        shown = [f"{suffix} ({count})" if count > 1 else suffix for suffix, count in suffixes.most_common()]
    else:
        shown = names
    more = ", ..." if len(shown) > MAX_NAMES else ""
    text = f"{len(names)} {reason} ({', '.join(shown[:MAX_NAMES])}{more})"
    return "".join(c if c.isprintable() else "?" for c in text)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
