"""Text and JSON files that others wrote: read whole or refused in one line, never half understood.

Python's own `json` takes the last of two equal keys, NaN, and numbers of any length without a word.
"""

import importlib
import json
import math
from pathlib import Path
from typing import Any

from smollm_jax.errors import InputFileError, UsageError, short_repr
from smollm_jax.runtime import install

MAX_BYTES = 4 << 20  # of a JSON file; the longest of ours has 30 KB
MAX_DIGITS = 100  # of an integer; Hugging Face writes 10**30 for "no limit"


def import_optional(module: str, path: str | Path, *, extra: str | None = None) -> Any:
    """An optional package, imported; raises `UsageError` saying how to get the extra that has it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(install.needs(f"{path}:", extra or module)) from error


def one_line(error: BaseException) -> str:
    """What another library says is wrong, as one line of bounded length."""
    text = " ".join((str(error) or repr(error)).split())
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def file_size(path: Path) -> int:
    """The bytes of a regular file; `InputFileError` for a missing file, a folder, a pipe, a device."""
    if not path.is_file():
        raise InputFileError(f"{path}: no such file")
    return path.stat().st_size


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """A small file's content; `InputFileError` when it is larger than `limit` bytes."""
    if (size := file_size(path)) > limit:
        raise InputFileError(f"{path}: {size:,} bytes are too many for such a file, at most {limit:,}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read: {error}") from error


def reject_bom(head: bytes, path: Path) -> None:
    """Raises `InputFileError` when a text's first bytes are a byte order mark, or UTF-16."""
    if head.startswith(b"\xef\xbb\xbf"):
        raise InputFileError(f"{path}: begins with a byte order mark: save it as UTF-8 without BOM")
    reject_utf16(head, path)


def reject_utf16(head: bytes, path: Path) -> None:
    """Raises `InputFileError` when a text's first bytes are those of UTF-16, with a byte order mark or without."""
    # Latin text in UTF-16 without a mark: every other byte is NUL.
    halves = [head[parity::2] for parity in (0, 1)]
    fewer, more = sorted(half.count(0) / max(len(half), 1) for half in halves)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or (more > 0.5 and fewer < 0.1):
        raise InputFileError(f"{path}: looks like UTF-16: save it as UTF-8")


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """A small file's UTF-8 text; `InputFileError` names the first byte that is none."""
    return text_of(read_bytes(path, limit), path)


def text_of(content: bytes, path: Path) -> str:
    """The UTF-8 text of a file's content; `InputFileError` names the first byte that is none."""
    reject_bom(content[:4096], path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputFileError(f"{path}: byte {error.start} is not UTF-8") from error


def read_json(path: Path, limit: int = MAX_BYTES) -> Any:
    """The JSON value in a file; raises `InputFileError` naming the file and the line or the key."""
    return parse_json(read_text(path, limit), path)


def parse_json(text: str, where: object, *, finite: bool = True) -> Any:
    """The JSON value of a text; raises `InputFileError` naming `where` and the line or the key.

    A key that occurs twice is refused, and so are NaN, Infinity and a number too large to hold where all are to be
    `finite`: in a row of a data set they are a field that is not read.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object if finite else _unique, parse_int=_integer)
        if finite:
            _refuse_numbers("the top", value)
    except json.JSONDecodeError as error:
        raise InputFileError(f"{where}: not readable as JSON: {error}") from error
    except _FaultError as error:
        raise InputFileError(f"{where}: {error}") from error
    except RecursionError as error:
        raise InputFileError(f"{where}: not readable as JSON: nested too deeply") from error
    return value


class _FaultError(Exception):
    pass


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf  # refused in `_object`, which knows the key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _FaultError(f"key {short_repr(twice)} occurs twice")
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = _unique(pairs)
    for key, value in pairs:
        if type(value) is float or type(value) is list:  # not a call for each of a vocabulary's entries
            _refuse_numbers(key, value)
    return values


def _refuse_numbers(key: str, value: Any) -> None:
    if type(value) is float and not math.isfinite(value):
        raise _FaultError(f"key {short_repr(key)} is NaN, infinite or a number too large to hold")
    if type(value) is list:
        for item in value:
            if type(item) is float or type(item) is list:  # not a call for each of a tokenizer's merges
                _refuse_numbers(key, item)
