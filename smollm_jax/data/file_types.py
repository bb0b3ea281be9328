"""The type of a text file, its form and compression, from its first bytes and its name; or why it is not text.

Where the first bytes contradict the name, they decide: the file is read as what it is, or refused. A file named as
plain text that holds JSON is refused.
"""

import codecs
import json
import re
from pathlib import Path
from typing import NamedTuple

from smollm_jax.data.compression import COMPRESSIONS, detect_compression, open_decompressed
from smollm_jax.errors import InputFileError
from smollm_jax.runtime.files import one_line

PLAIN, JSON_LINES, JSON, CSV, TSV, PARQUET, ARROW = "plain", "JSON lines", "JSON", "csv", "tsv", "Parquet", "Arrow"
FORMS = {
    ".txt": PLAIN,
    ".text": PLAIN,
    ".md": PLAIN,
    ".markdown": PLAIN,
    ".rst": PLAIN,
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".jsonlines": JSON_LINES,
    ".json": JSON,
    ".csv": CSV,
    ".tsv": TSV,
    ".parquet": PARQUET,
    ".pq": PARQUET,
    ".arrow": ARROW,
    ".feather": ARROW,
}
HEAD = 4096  # bytes, enough to recognise most types
SAMPLE = 1 << 20  # bytes that are parsed to recognise JSON

UNPACK = "unpack it and name the files in it"
EXTRACT = "extract its text into a .txt or .jsonl first"
CONVERT = "convert it to Parquet or JSONL first"
ONLY = "give text, or a folder that prepare_data.py wrote"
NOT_TEXT = (  # (offset, bytes there, what they indicate, what to do)
    (0, b"version https://git-lfs.github.com/spec/", "a Git LFS pointer", "fetch the file itself with `git lfs pull`"),
    (0, b"PK\x03\x04", "a ZIP archive (.zip, .docx, .epub, .xlsx, .npz)", UNPACK),
    (0, b"PK\x05\x06", "a ZIP archive", UNPACK),
    (257, b"ustar\0", "a tar archive", UNPACK),
    (257, b"ustar  \0", "a tar archive", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (0, b"\x04\x22\x4d\x18", "LZ4", "decompress it first"),
    (0, b"%PDF-", "a PDF", EXTRACT),
    (0, b"%!PS", "PostScript", EXTRACT),
    (0, b"{\\rtf", "RTF", EXTRACT),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document (.doc, .xls)", EXTRACT),
    (0, b"SQLite format 3\0", "an SQLite database", CONVERT),
    (0, b"Obj\x01", "Avro", CONVERT),
    (0, b"\x89HDF", "HDF5", CONVERT),
    (0, b"FEA1", "Feather's first version", CONVERT),
    (0, b"\x93NUMPY", "a NumPy array", ONLY),
    (0, b"\x80\x02", "a pickle", CONVERT),
    (0, b"\x80\x03", "a pickle", CONVERT),
    (0, b"\x80\x04", "a pickle", CONVERT),
    (0, b"\x80\x05", "a pickle", CONVERT),
    (0, b"\0\x05\x16\x07", "macOS's AppleDouble (._ file)", "it holds no text, remove it"),
    (0, b"\0\x05\x16\0", "macOS's AppleSingle", "it holds no text, remove it"),
    (0, b"\x7fELF", "a program", "it holds no text"),
    (0, b"\x89PNG", "an image", "it holds no text"),
    (0, b"\xff\xd8\xff", "an image", "it holds no text"),
)
MARKUP = re.compile(rb"\s*(?:<!doctype\s+html|<html[\s>]|<\?xml\s)", re.IGNORECASE)
NOT_TEXT_BY_NAME = {  # suffixes of files that may decode as text, but are not meant to be trained on
    **dict.fromkeys((".html", ".htm", ".xhtml", ".mhtml"), ("an HTML page", EXTRACT)),
    **dict.fromkeys((".xml", ".rtf", ".fb2"), ("markup around a text", EXTRACT)),
    ".ipynb": ("a Jupyter notebook", "export it (`jupyter nbconvert --to markdown`)"),
    **dict.fromkeys((".npy", ".npz", ".bin", ".pt", ".pth", ".pkl"), ("binary data", ONLY)),
    **dict.fromkeys((".safetensors", ".gguf"), ("weights", ONLY)),
    **dict.fromkeys((".orc", ".avro", ".h5", ".hdf5", ".sqlite", ".db", ".xlsx", ".xls"), ("a database", CONVERT)),
    **dict.fromkeys((".zip", ".tar", ".7z", ".rar"), ("an archive", UNPACK)),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub", ".mobi"), ("a formatted document", EXTRACT)),
}


class FileSlice(NamedTuple):
    """A range of a file: row groups of Parquet, otherwise bytes; the whole file if it cannot be divided."""

    file: Path
    start: int
    stop: int


class TextChunk(NamedTuple):
    """A document, or a chunk of a long one."""

    text: str
    ends: bool  # whether the document ends with it
    where: str  # its file and line, row or document, for error messages
    position: float  # the fraction of the slice that is read, 0 to 1


class FileType(NamedTuple):
    """The form of a file's content and its compression."""

    form: str
    compression: str | None  # of the file as a whole, which can then only be read from its start

    @property
    def divisible(self) -> bool:
        """Whether it can be read from other positions than its start."""
        return not self.compression and self.form in (PLAIN, JSON_LINES)


def suffixes_of(file: Path) -> tuple[str, str]:
    """The suffixes that name a file's form and its compression, in lower case, "" where there is none."""
    name = file.name.lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    return Path(name.removesuffix(compression)).suffix, compression


def type_by_name(file: Path) -> tuple[str | None, str | None]:
    """The form and the compression that a file's suffixes name, each None where there is no known suffix."""
    form, compression = suffixes_of(file)
    return FORMS.get(form), COMPRESSIONS.get(compression)


def detect_file_type(file: Path) -> FileType:
    """A file's type; raises `InputFileError` saying what it looks like and what to do if it is not text."""
    form, compression = type_by_name(file)
    try:
        with file.open("rb") as raw:
            head = raw.read(HEAD)
            raw.seek(max(0, raw.seek(0, 2) - 4))
            tail = raw.read(4)
    except OSError as error:
        raise InputFileError(f"{file}: cannot be read: {one_line(error)}") from error
    if head and compression and not detect_compression(head):
        advice = f"if it is not compressed, rename it without {suffixes_of(file)[1]}"
        raise InputFileError(f"{file}: cannot be decompressed: its first bytes are not {compression}; {advice}")
    compression = detect_compression(head) or compression
    if compression and head:
        with open_decompressed(file, compression) as (stream, _):
            head = stream.read(HEAD)
        if detect_compression(head):
            raise InputFileError(f"{file}: is compressed twice: decompress it once")
    head = head.removeprefix(codecs.BOM_UTF8)
    _refuse_not_text(head, file)
    # Parquet has the same four bytes at both ends; a text may begin with "PARENTS".
    binary = PARQUET if head[:4] == tail in (b"PAR1", b"PARE") else ARROW if _is_arrow(head) else None
    if binary or form in (PARQUET, ARROW):
        if compression:
            raise InputFileError(f"{file}: {binary or form} in {compression}: decompress it first")
        return FileType(binary or str(form), None)
    if not form and (not_text := NOT_TEXT_BY_NAME.get(suffixes_of(file)[0])):
        what, advice = not_text
        raise InputFileError(f"{file}: is {what} by its name: {advice}")
    if form not in (CSV, TSV) and (json_form := _json_form(file, compression, head)):
        if form == PLAIN:
            raise InputFileError(f"{file}: holds {json_form}, not plain text: rename it to end in .jsonl or .json")
        # A line of JSON lines may itself be an array; only an array of objects is taken for the whole file.
        if form != JSON_LINES or not re.match(rb"\s*\[(?!\s*\{)", head):
            form = json_form
    return FileType(form or PLAIN, compression)


def _is_arrow(head: bytes) -> bool:
    """Whether a file begins as Arrow's IPC file or stream does."""
    return head.startswith(b"ARROW1\0\0") or (head.startswith(b"\xff\xff\xff\xff") and len(head) > 8)


def _refuse_not_text(head: bytes, file: Path) -> None:
    for offset, magic, what, advice in NOT_TEXT:
        if head.startswith(magic, offset):
            raise InputFileError(f"{file}: looks like {what}: {advice}")
    if MARKUP.match(head):
        markup = "to train on the markup itself, put it into JSONL"
        raise InputFileError(f"{file}: looks like an HTML or XML page: {EXTRACT}; {markup}")


def _json_form(file: Path, compression: str | None, head: bytes) -> str | None:
    """`JSON_LINES` for one object a line, `JSON` for an array or for objects over several lines, None for neither."""
    if not re.match(rb"\s*[\[{]", head):
        return None
    with open_decompressed(file, compression) as (stream, _):
        content = stream.read(SAMPLE)
    text = content.decode("utf-8-sig", errors="ignore").lstrip()
    whole = len(content) < SAMPLE
    if text.startswith("{"):
        lines = [line for line in text.split("\n") if line.strip()]
        are_objects = [_is_json(line, dict) for line in (lines if whole else lines[:-1])[:2]]
        if are_objects[:1] == [True]:
            return JSON_LINES if all(are_objects) else None
        if not whole and len(lines) < 2:  # the first line is longer than the sample
            return JSON_LINES if re.match(r'\{\s*"[^"\\]*"\s*:', text) else None
    return JSON if _begins_with_values(text, whole) else None


def _is_json(text: str, kinds: type | tuple[type, ...] = object) -> bool:
    try:
        return isinstance(json.loads(text), kinds)
    except (ValueError, RecursionError):
        return False


def _begins_with_values(text: str, whole: bool) -> bool:
    """Whether a text begins with an object, or an array of objects or strings; unless `whole` it may be cut off."""
    start = len(text) - len(text[1:].lstrip()) if text.startswith("[") else 0
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        begins = re.match(r'\{\s*"[^"\\]*"\s*:', text[start : start + HEAD])
        return not whole and begins is not None
    follows = text[end:].lstrip()[:1]
    if start and whole and isinstance(value, str):  # it may be prose: ["Hello", she said]
        return _is_json(text)
    if start:
        return isinstance(value, dict | str) and (follows in (",", "]") or not (whole or follows))
    return isinstance(value, dict) and (follows == "{" or not follows)
