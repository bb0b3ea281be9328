"""Which files a source of text means: a file, a folder or a glob. What of a folder is left out is counted and said.

Of a folder are read the files whose names say that they are text (`text_kinds.FORMS`). Hidden files, dataset cards and
other books about a data set are not, and of its splits only the one to train on. The words that name splits are those
of Hugging Face's datasets (data_files.py, SPLIT_KEYWORDS).
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

from smollm_jax.data.compression import opened
from smollm_jax.data.text_kinds import ARROW, CSV, FORMS, JSON, PLAIN, TSV, named_kind, suffixes_of
from smollm_jax.errors import InputFileError
from smollm_jax.runtime.files import one_line

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
SEPARATORS = re.compile(r"[-._ 0-9]+")  # what stands around a split's word in a name
HIDDEN, CARD, LICENCE, RECORD, STRANGE, LINK, AGAIN = (
    "hidden",
    "dataset card",
    "licence",
    "record about a data set",
    "not text by name",
    "link to a folder, or no file",
    "link to a file that is read itself",
)
RECORDS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
NO_FOLDERS = ("_delta_log", "_temporary", "@eaDir", "$RECYCLE.BIN")  # next to those whose names begin with . or __
NAMED = 3  # of what is left out for one reason


class Chosen(NamedTuple):
    """The files of a source, in order, and what to say of those that were left out."""

    files: list[Path]
    notes: list[str]


def text_files(source: Path) -> list[Path]:
    """The files a source consists of, in order: a file, a folder or a glob; `InputFileError` when there are none."""
    return choose(source).files


def choose(source: Path, column: str = "text", splits: tuple[str, ...] = ("train",)) -> Chosen:
    """The files of a source and what is said of the others; of a data set's splits the first there is of `splits`.

    Raises `InputFileError` when there is nothing to read.
    """
    if source.is_file():
        return Chosen([source], [])
    if source.is_dir():
        return _folder(source, column, splits)
    if re.search(r"[*?\[]", str(source)) and (matches := sorted(glob.glob(str(source), recursive=True))):
        return _matches(source, [Path(match) for match in matches], column, splits)
    if source.exists():
        raise InputFileError(f"{source}: is no file on a disk, which can be read twice: save it as one")
    raise InputFileError(f"{source}: no such file or folder{_elsewhere(source)}")


def _elsewhere(source: Path) -> str:
    """What to do where a path that is not there is an address, or can be a data set's name on the hub; "" otherwise."""
    if re.match(r"\w+:/", str(source)):
        return ": an address is not fetched: download the file and give its path"
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)) and not source.parent.exists() and not named_kind(source)[0]:
        name = f"hf download --repo-type dataset {source} --local-dir {source.name}"
        return f"; a data set of the Hugging Face hub is downloaded first: {name}"
    return ""


def _matches(source: Path, matches: list[Path], column: str, splits: tuple[str, ...]) -> Chosen:
    """The files a glob names, whatever they are called, and the text of the folders it names."""
    again: list[str] = []
    files = dict.fromkeys(
        _once([match for match in matches if match.is_file()], lambda _, path: again.append(str(path)))
    )
    notes = [f"{source}: leaves out {_counted(AGAIN, again)}"] if again else []
    for match in matches:
        # Of `folder/**` the folders are matched as well as what is in them.
        if match.is_dir() and not any(match in file.parents for file in files):
            more = _folder(match, column, splits)
            files |= dict.fromkeys(more.files)
            notes += more.notes
    if not files:
        raise InputFileError(f"{source}: no such file or folder")
    note = note_of_splits(source, list(files))
    return Chosen(list(files), notes + ([note] if note else []))


def note_of_splits(source: object, files: list[Path]) -> str | None:
    """What to say of files that were named one by one, and are read, where only some are of the split to train on."""
    counts = collections.Counter(split_of(Path(file.name)) for file in files)
    others = [f"{split} ({_plural(counts[split], 'file')})" for split in ("validation", "test") if counts[split]]
    if not counts["train"] or not others:
        return None
    return f"{source}: note: reads all that is named, of these splits too: {', '.join(others)}"


def _folder(source: Path, column: str, splits: tuple[str, ...]) -> Chosen:
    skipped: dict[str, list[str]] = collections.defaultdict(list)
    files = _walk(source, lambda reason, path: skipped[reason].append(str(path.relative_to(source))))
    tables = any(named_kind(file)[0] not in (PLAIN, None) for file in files)
    kept = []
    for file in files:
        if reason := _book(file, tables, column):
            skipped[reason].append(str(file.relative_to(source)))
        else:
            kept.append(file)
    rows = [file for file in kept if named_kind(file)[0] != PLAIN]
    if rows and len(rows) < len(kept) and not any(_may_have(file, column) for file in rows):
        skipped[RECORD] += [str(file.relative_to(source)) for file in rows]
        kept = [file for file in kept if file not in rows]
    kept, note = _of_split(source, kept, splits)
    others = ", ".join(_counted(reason, names) for reason, names in skipped.items())
    if not kept:
        kinds = ", ".join(FORMS)
        also = f"; it has {others}" if others else ""
        raise InputFileError(f"{source}: holds no file that ends in {kinds} (or .gz, .zst, .xz, .bz2 after that){also}")
    notes = [f"{source}: reads {_plural(len(kept), 'file')}, leaves out {others}"] if others else []
    return Chosen(kept, notes + ([note] if note else []))


def _walk(source: Path, skip: Callable[[str, Path], None]) -> list[Path]:
    """The files under a folder whose names say that they are text, in order; the others go to `skip`."""

    def refuse(error: OSError) -> None:
        raise InputFileError(f"{error.filename}: cannot be read: {one_line(error)}") from error

    files = []
    for place, folders, names in os.walk(source, onerror=refuse):
        for name in sorted(folders):
            path = Path(place, name)
            hidden = name.startswith((".", "__")) or name in NO_FOLDERS
            if hidden or path.is_symlink():
                skip(HIDDEN if hidden else LINK, path)
                folders.remove(name)
        for name in sorted(names):
            path = Path(place, name)
            if name.startswith("."):
                skip(HIDDEN, path)
            elif not named_kind(path)[0]:
                skip(LICENCE if _is_licence(name) else STRANGE, path)
            elif not path.is_file():  # a pipe would be waited for
                skip(LINK, path)
            else:
                files.append(path)
    return _once(sorted(files), skip)


def _once(files: list[Path], skip: Callable[[str, Path], None]) -> list[Path]:
    """The files without links to others of them, which go to `skip`; of several links to one file the first is kept."""
    if not any(file.is_symlink() for file in files):
        return files
    places = {os.path.realpath(file) for file in files if not file.is_symlink()}
    kept = []
    for file in files:
        if not file.is_symlink():
            kept.append(file)
        elif (real := os.path.realpath(file)) in places:
            skip(AGAIN, file)
        else:
            places.add(real)
            kept.append(file)
    return kept


def _is_licence(name: str) -> bool:
    return re.fullmatch(r"(?i)(un)?(licen[cs]e|copying|notice)([-._]\w+)*", name) is not None


def _book(file: Path, tables: bool, column: str) -> str | None:
    """Why a file is about a data set rather than of it, or None; `tables` tells that files of rows lie with it."""
    name, form = file.name.lower(), named_kind(file)[0]
    if form == PLAIN and _is_licence(file.name):
        return LICENCE
    if name in ("readme.md", "readme.txt", "readme.rst") and (tables or _has_front_matter(file)):
        return CARD
    if name in RECORDS or (form == JSON and _is_record(file, column)):
        return RECORD
    if form == ARROW and name.startswith("cache-"):  # what `datasets` keeps of what it computed
        return RECORD
    return None


def _has_front_matter(file: Path) -> bool:
    """Whether a Markdown file begins with YAML between two lines of ---, as a dataset card does."""
    with file.open("rb") as raw:
        return re.match(rb"(?:\xef\xbb\xbf)?---\r?\n(?:.*\n)*?---\s", raw.read(1 << 16)) is not None


def _is_record(file: Path, column: str) -> bool:
    """Whether a file of JSON is one object that has no text in it."""
    if suffixes_of(file)[1] or file.stat().st_size > 1 << 20:
        return False
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and column not in value


def _may_have(file: Path, column: str) -> bool:
    """Whether a file of rows has a column of text: but for CSV, TSV and JSON, which record anything, it should."""
    form, packing = named_kind(file)
    if form not in (CSV, TSV, JSON):
        return True
    with opened(file, packing) as (stream, _):
        head = stream.read(1 << 16).decode("utf-8-sig", errors="replace")
    if form == JSON:
        return f'"{column}"' in head or re.match(r'\s*\[\s*"', head) is not None
    return column in next(csv.reader(head.splitlines()[:1], delimiter="," if form == CSV else "\t"), [])


# ----------------------------------------------------------------------------------------------------- splits


def split_of(path: Path) -> str | None:
    """The split that a path within a data set names: by a folder, the outermost first, else by the file's name."""
    for part in (*path.parts[:-1], path.name):
        for word in SEPARATORS.split(part.lower()):
            if word in SPLIT_OF:
                return SPLIT_OF[word]
    return None


def _of_split(source: Path, files: list[Path], splits: tuple[str, ...]) -> tuple[list[Path], str | None]:
    """The files of the split that is wanted and those of none, and what to say of it.

    A plain text is of another split only if its name is that of a file of the wanted one but for the split's word:
    among essays, test.txt is an essay.
    """
    named = {file: split_of(file.relative_to(source)) for file in files}
    present = collections.Counter(named.values())
    wanted = next((split for split in splits if present[split]), None)
    if wanted is None:
        there = " and ".join(sorted(split for split in present if split))
        note = f"{source}: has no {splits[0]} split: reads {there}" if there and not present[None] else None
        return files, note
    shapes = {_shape(file.relative_to(source)) for file, split in named.items() if split == wanted}
    kept, others = [], collections.Counter()
    for file, split in named.items():
        plain = named_kind(file)[0] == PLAIN
        if split in (None, wanted) or (plain and _shape(file.relative_to(source)) not in shapes):
            kept.append(file)
        else:
            others[str(split)] += 1
    if not others:
        return files, None
    left_out = ", ".join(f"{split} ({_plural(count, 'file')})" for split, count in sorted(others.items()))
    return kept, f"{source}: reads the {wanted} split ({_plural(len(kept), 'file')}), leaves out {left_out}"


def _shape(path: Path) -> tuple[str, ...]:
    """What of a path does not depend on the split and the shard."""
    by_folder = split_of(path.parent / "_") is not None
    words = SEPARATORS.split(str(path.parent if by_folder else path).lower())
    suffixes = {suffix.lstrip(".") for suffix in suffixes_of(path)}
    parts = (part for word in words for part in word.split(os.sep))
    return tuple(part for part in parts if part and part not in SPLIT_OF and part not in ("of", *suffixes))


def _counted(reason: str, names: list[str]) -> str:
    """How many files were left out for a reason, and some of their names; of strange ones the suffixes."""
    if reason == STRANGE:
        kinds = collections.Counter(Path(name).suffix.lower() or Path(name).name for name in names)
        shown = [f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.most_common()]
    else:
        shown = names
    more = ", ..." if len(shown) > NAMED else ""
    text = f"{len(names)} {reason} ({', '.join(shown[:NAMED])}{more})"
    return "".join(c if c.isprintable() else "?" for c in text)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
