"""What a file of text is: its form and how it is compressed, by its content and its name, or why it is no text.

A name says what a file should be. Its first bytes may prove it to be something else, which is then read as what it is,
or refused: a file of JSON is never read as plain text.
"""

import codecs
import json
import re
from pathlib import Path
from typing import NamedTuple

from smollm_jax.data.compression import PACKINGS, opened, packing_of
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
HEAD = 4096  # bytes that tell most files apart
SAMPLE = 1 << 20  # bytes in which a JSON value that ends within them is known to be one

UNPACK = "unpack it and name the files in it"
EXTRACT = "extract its text into a .txt or .jsonl first"
CONVERT = "convert it to Parquet or JSONL first"
ONLY = "only text is read, and what prepare_data.py wrote"
STRANGERS = (  # (place, first bytes, what they show, what to do)
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
BY_NAME = {  # suffixes of files that are text to Python, but not what their owner wants to train on
    **dict.fromkeys((".html", ".htm", ".xhtml", ".mhtml"), ("an HTML page", EXTRACT)),
    **dict.fromkeys((".xml", ".rtf", ".fb2"), ("markup around a text", EXTRACT)),
    ".ipynb": ("a Jupyter notebook", "export it (`jupyter nbconvert --to markdown`)"),
    **dict.fromkeys((".npy", ".npz", ".bin", ".pt", ".pth", ".pkl"), ("binary data", ONLY)),
    **dict.fromkeys((".safetensors", ".gguf"), ("weights", ONLY)),
    **dict.fromkeys((".orc", ".avro", ".h5", ".hdf5", ".sqlite", ".db", ".xlsx", ".xls"), ("a database", CONVERT)),
    **dict.fromkeys((".zip", ".tar", ".7z", ".rar"), ("an archive", UNPACK)),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub", ".mobi"), ("a formatted document", EXTRACT)),
}


class Part(NamedTuple):
    """What of a file is read: bytes of one that can be divided, row groups of Parquet, else all of it."""

    file: Path
    start: int
    stop: int


class Passage(NamedTuple):
    """A document or, of a long text, a piece of one."""

    text: str
    ends: bool  # the document does
    where: str  # it stands, for an error
    position: float  # how much of its file is read, 0 to 1


class Kind(NamedTuple):
    """What a file is."""

    form: str
    packing: str | None  # how it is compressed as a whole, so that it can only be read from its start

    @property
    def divisible(self) -> bool:
        """Whether it can be read from other places than its start."""
        return not self.packing and self.form in (PLAIN, JSON_LINES)


def suffixes_of(file: Path) -> tuple[str, str]:
    """The suffix that names a file's form and the one that names its packing, in lower case, "" where there is none."""
    name = file.name.lower()
    packing = next((suffix for suffix in PACKINGS if name.endswith(suffix)), "")
    return Path(name.removesuffix(packing)).suffix, packing


def named_kind(file: Path) -> tuple[str | None, str | None]:
    """The form and the packing that a name says, None for what it does not say."""
    form, packing = suffixes_of(file)
    return FORMS.get(form), PACKINGS.get(packing)


def kind_of(file: Path) -> Kind:
    """What a file is; raises `InputFileError` that says what it looks like and what to do when it is no text."""
    form, packing = named_kind(file)
    try:
        with file.open("rb") as raw:
            head = raw.read(HEAD)
            raw.seek(max(0, raw.seek(0, 2) - 4))
            tail = raw.read(4)
    except OSError as error:
        raise InputFileError(f"{file}: cannot be read: {one_line(error)}") from error
    if head and packing and not packing_of(head):
        unpacked = f"if it is not compressed, name it without {suffixes_of(file)[1]}"
        raise InputFileError(f"{file}: cannot be decompressed: it does not begin as {packing} does; {unpacked}")
    packing = packing_of(head) or packing
    if packing and head:
        with opened(file, packing) as (stream, _):
            head = stream.read(HEAD)
        if packing_of(head):
            raise InputFileError(f"{file}: is compressed twice: decompress it once")
    head = head.removeprefix(codecs.BOM_UTF8)
    _refuse_strangers(head, file)
    # Parquet ends as it begins; a text may begin with PARENTS.
    binary = PARQUET if head[:4] == tail in (b"PAR1", b"PARE") else ARROW if _is_arrow(head) else None
    if binary or form in (PARQUET, ARROW):
        if packing:
            raise InputFileError(f"{file}: {binary or form} in {packing}: decompress it first")
        return Kind(binary or str(form), None)
    if not form and (name := BY_NAME.get(suffixes_of(file)[0])):
        raise InputFileError(f"{file}: is {name[0]} by its name: {name[1]}")
    if form not in (CSV, TSV) and (seen := _json_form(file, packing, head)):
        if form == PLAIN:
            raise InputFileError(f"{file}: holds {seen}, no plain text: give it a name that ends in .jsonl or .json")
        # A line of JSON lines may be a list: only one of objects is a whole file's.
        if form != JSON_LINES or not re.match(rb"\s*\[(?!\s*\{)", head):
            form = seen
    return Kind(form or PLAIN, packing)


def _is_arrow(head: bytes) -> bool:
    """Whether a file begins as Arrow's IPC file or stream does."""
    return head.startswith(b"ARROW1\0\0") or (head.startswith(b"\xff\xff\xff\xff") and len(head) > 8)


def _refuse_strangers(head: bytes, file: Path) -> None:
    for place, magic, what, advice in STRANGERS:
        if head.startswith(magic, place):
            raise InputFileError(f"{file}: looks like {what}: {advice}")
    if MARKUP.match(head):
        markup = "to train on the markup itself, put it into JSONL"
        raise InputFileError(f"{file}: looks like an HTML or XML page: {EXTRACT}; {markup}")


def _json_form(file: Path, packing: str | None, head: bytes) -> str | None:
    """Which form of JSON a file is in: lines of objects, one value or several over many lines, or None for neither."""
    if not re.match(rb"\s*[\[{]", head):
        return None
    with opened(file, packing) as (stream, _):
        content = stream.read(SAMPLE)
    text = content.decode("utf-8-sig", errors="ignore").lstrip()
    whole = len(content) < SAMPLE
    if text.startswith("{"):
        lines = [line for line in text.split("\n") if line.strip()]
        first = [_is_json(line, dict) for line in (lines if whole else lines[:-1])[:2]]
        if first[:1] == [True]:
            return JSON_LINES if all(first) else None
        if not whole and len(lines) < 2:  # a line of a megabyte
            return JSON_LINES if re.match(r'\{\s*"[^"\\]*"\s*:', text) else None
    return JSON if _begins_values(text, whole) else None


def _is_json(text: str, kinds: type | tuple[type, ...] = object) -> bool:
    try:
        return isinstance(json.loads(text), kinds)
    except (ValueError, RecursionError):
        return False


def _begins_values(text: str, whole: bool) -> bool:
    """Whether a text begins with an object, or with an array of objects or strings; one cut short may be either."""
    place = len(text) - len(text[1:].lstrip()) if text.startswith("[") else 0
    try:
        value, end = json.JSONDecoder().raw_decode(text, place)
    except (ValueError, RecursionError):
        begins = re.match(r'\{\s*"[^"\\]*"\s*:', text[place : place + HEAD])
        return not whole and begins is not None
    follows = text[end:].lstrip()[:1]
    if place and whole and isinstance(value, str):  # or a text that begins with ["Hello", she said]
        return _is_json(text)
    if place:
        return isinstance(value, dict | str) and (follows in (",", "]") or not (whole or follows))
    return isinstance(value, dict) and (follows == "{" or not follows)
