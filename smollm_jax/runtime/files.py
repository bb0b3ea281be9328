"""Strict readers of text and JSON files from elsewhere: whatever is malformed is an error of one line.

Duplicate keys, NaN and huge numbers are errors too: Python's `json` silently accepts all three.
"""

import importlib
import json
import math
from pathlib import Path
from typing import Any

from smollm_jax.errors import InputFileError, UsageError, short_repr
from smollm_jax.runtime import install

MAX_BYTES = 4 << 20  # of a JSON file; the largest that this project writes has 30 KB
MAX_DIGITS = 100  # of an integer; Hugging Face writes 10**30 for "no limit"


def import_optional(module: str, path: str | Path, *, extra: str | None = None) -> Any:
    """Imports an optional package; raises `UsageError` with the command that installs its extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(install.needs(f"{path}:", extra or module)) from error


def one_line(error: BaseException) -> str:
    """The message of another library's exception as one printable line of at most 200 characters."""
    text = " ".join((str(error) or repr(error)).split())
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def utf8(text: str) -> str:
    r"""A text that may hold the name of a file, for UTF-8: a byte that is not becomes "\udcff" and the like."""
    return text.encode(errors="backslashreplace").decode()


def file_size(path: Path) -> int:
    """The size of a regular file in bytes; `InputFileError` for a missing file, a folder, a pipe or a device."""
    if not path.is_file():
        raise InputFileError(f"{path}: no such file")
    return path.stat().st_size


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """A small file's content; `InputFileError` when it is larger than `limit` bytes."""
    if (size := file_size(path)) > limit:
        raise InputFileError(f"{path}: too large: {size:,} bytes, at most {limit:,} are read")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read: {error}") from error


def reject_bom(head: bytes, path: Path) -> None:
    """Raises `InputFileError` when the first bytes of a text are a byte order mark or look like UTF-16."""
    if head.startswith(b"\xef\xbb\xbf"):
        raise InputFileError(f"{path}: begins with a byte order mark: save it as UTF-8 without BOM")
    reject_utf16(head, path)


def reject_utf16(head: bytes, path: Path) -> None:
    """Raises `InputFileError` when the first bytes of a text look like UTF-16, with or without a byte order mark."""
    # In Latin text as UTF-16 every other byte is NUL.
    halves = [head[parity::2] for parity in (0, 1)]
    fewer, more = sorted(half.count(0) / max(len(half), 1) for half in halves)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or (more > 0.5 and fewer < 0.1):
        raise InputFileError(f"{path}: looks like UTF-16: save it as UTF-8")


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """A small file's UTF-8 text; `InputFileError` names the first invalid byte."""
    return text_of(read_bytes(path, limit), path)


def text_of(content: bytes, path: Path) -> str:
    """The UTF-8 text of a file's content; `InputFileError` names the first invalid byte."""
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

    A duplicate key is an error. With `finite`, so are NaN, Infinity and integers of more than MAX_DIGITS digits; rows
    of a data set are parsed without, since such a number can be in a field that is not read.
    """
    try:
        value = json.loads(text, object_pairs_hook=_finite_object if finite else _unique_keys, parse_int=_integer)
        if finite:
            _reject_non_finite("the top", value)
    except json.JSONDecodeError as error:
        raise InputFileError(f"{where}: not readable as JSON: {error}") from error
    except _InvalidJsonError as error:
        raise InputFileError(f"{where}: {error}") from error
    except RecursionError as error:
        raise InputFileError(f"{where}: not readable as JSON: nested too deeply") from error
    return value


class _InvalidJsonError(Exception):
    pass


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf  # rejected in `_finite_object`, which knows the key


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _InvalidJsonError(f"key {short_repr(duplicate)} occurs twice")
    return values


def _finite_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = _unique_keys(pairs)
    for key, value in pairs:
        if type(value) is float or type(value) is list:  # saves a call for every entry of a vocabulary
            _reject_non_finite(key, value)
    return values


def _reject_non_finite(key: str, value: Any) -> None:
    if type(value) is float and not math.isfinite(value):
        raise _InvalidJsonError(f"key {short_repr(key)} is NaN, infinite or too large a number")
    if type(value) is list:
        for item in value:
            if type(item) is float or type(item) is list:  # saves a call for every merge of a tokenizer
                _reject_non_finite(key, item)
