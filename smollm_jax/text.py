"""Text out of files: plain, JSONL, either of them compressed, and Parquet. Read a block of lines or a page at a time.

What is no UTF-8 text is refused by line, byte or row. Memory is bounded by `MAX_LINE`, whatever a file holds.
"""

import glob
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from smollm_jax.config import shown
from smollm_jax.errors import InputFileError
from smollm_jax.files import need, one_line, parse_json, refuse_marks

TEXT_SUFFIXES = (".txt", ".text", ".md")
PACKED = (".gz", ".zst")
SUFFIXES = tuple(f"{suffix}{packed}" for suffix in (*TEXT_SUFFIXES, ".jsonl") for packed in ("", *PACKED))
MAX_LINE = 16 << 20  # bytes; a whole book has 1 MB
PIECE = 1 << 16  # characters of a long text that are encoded at once, and bytes that are read at once
# Where SmolLM2's pre-tokenizer (Digits, then GPT-2's pattern) ends a word whatever lies around: before or, a newline,
# after one space between two characters that are none. A run of spaces would be split differently at a text's end.
CUT = re.compile(r"(?<=\S)[ \n\t](?=\S)")


class Passage(NamedTuple):
    """A document or, of a long text, a piece of one."""

    text: str
    ends: bool  # the document does
    where: str  # it stands, for an error
    position: float  # how much of its file is read, 0 to 1


class Part(NamedTuple):
    """What of a file is read: bytes of a plain one, row groups of Parquet, else all of it."""

    file: Path
    start: int
    stop: int


def text_files(source: Path) -> list[Path]:
    """The files a source consists of, in order: a file, a folder or a glob; `InputFileError` when there are none."""
    if source.is_file():
        return [source]
    if source.is_dir():
        named = [file for file in sorted(source.rglob("*")) if file.name.lower().endswith((*SUFFIXES, ".parquet"))]
        found = [file for file in named if file.is_file()]  # no pipe, which would be waited for
        if not found:
            kinds = f"{', '.join(TEXT_SUFFIXES)}, .jsonl (.gz, .zst) or .parquet"
            raise InputFileError(f"{source}: holds no file that ends in {kinds}")
        return found
    if re.search(r"[*?\[]", str(source)) and (matches := sorted(glob.glob(str(source), recursive=True))):
        return [file for match in matches for file in text_files(Path(match))]
    raise InputFileError(f"{source}: no such file or folder")


def is_packed(file: Path) -> bool:
    """Whether a file is compressed as a whole, so that it can only be read from its start."""
    return file.name.lower().endswith(PACKED)


def is_jsonl(file: Path) -> bool:
    """Whether a file holds JSON lines."""
    return file.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".jsonl")


def is_parquet(file: Path) -> bool:
    """Whether a file is Parquet."""
    return file.name.lower().endswith(".parquet")


def documents(file: Path, column: str = "text") -> Iterator[str]:
    """The documents of one file: its whole text, or the text of each line of JSONL or row of Parquet."""
    pieces: list[str] = []
    for passage in passages(whole(file), column, cut=False):
        pieces.append(passage.text)
        if passage.ends:
            yield "".join(pieces)
            pieces = []


def whole(file: Path) -> Part:
    """All of a file."""
    return Part(file, 0, parquet(file).num_row_groups if is_parquet(file) else file.stat().st_size)


def passages(part: Part, column: str = "text", *, cut: bool = True) -> Iterator[Passage]:
    """What a part of a file says, a document at a time; a long plain text in pieces if they may be `cut`.

    Line ends of plain text become a newline, as in Python's own reading of text.
    """
    if is_parquet(part.file):
        return _rows(part, column)
    return _json_lines(part, column) if is_jsonl(part.file) else _plain(part, cut)


def _plain(part: Part, cut: bool) -> Iterator[Passage]:
    where, ends = f"{part.file}: document 1", part.stop == part.file.stat().st_size
    texts: list[str] = []
    length, limit = 0, PIECE
    for block in _blocks(part):
        texts.append(_decoded(part, block).replace("\r\n", "\n").replace("\r", "\n"))
        length += len(texts[-1])
        if not cut or length < limit:
            continue
        text = "".join(texts)
        places = [m.start() for m in CUT.finditer(text, len(text) - 4096)] or [m.start() for m in CUT.finditer(text)]
        if places:
            yield Passage(text[: places[-1]], False, where, block.position)
            where = f"{part.file}: document 1, {block.position:.0%} into it"
            texts, length, limit = [text[places[-1] :]], len(text) - places[-1], PIECE
        elif length > MAX_LINE:
            raise InputFileError(f"{part.file}: no lone space between two words in {MAX_LINE:,} bytes: this is no text")
        else:
            limit = 2 * length
    if text := "".join(texts):
        yield Passage(text, ends, where, 1.0)


def _json_lines(part: Part, column: str) -> Iterator[Passage]:
    for block in _blocks(part):
        for line in block.lines():
            if not (text := _decoded(part, line)).strip():
                continue
            where = line.where(part)
            value = parse_json(text, where)
            if not isinstance(value, dict) or type(value.get(column)) is not str:
                raise InputFileError(f"{where} is no JSON object with a {column!r} that is a string")
            _refuse_nul(value[column], f"{where}: {column!r}")
            yield Passage(value[column], True, where, line.position)


class _Block(NamedTuple):
    """Whole lines of a file, but for the last one of a part."""

    content: bytes
    place: int  # of its first byte
    number: int  # of its first line, counted from the part's
    position: float  # how far into the part it ends, 0 to 1

    def lines(self) -> "Iterator[_Block]":
        """Each line, without its line end."""
        place = self.place
        for number, line in enumerate(self.content.split(b"\n"), self.number):
            yield _Block(line, place, number, self.position)
            place += len(line) + 1

    def where(self, part: Part) -> str:
        """Where it begins, for an error."""
        line = f"the line at byte {self.place}" if part.start else f"line {self.number}"
        return f"{part.file}: {line}"


def _decoded(part: Part, block: _Block) -> str:
    """The text of a block; raises `InputFileError` naming the byte that is not UTF-8 or the line with a NUL."""
    try:
        text = block.content.decode()
    except UnicodeDecodeError as error:
        raise InputFileError(f"{part.file}: byte {block.place + error.start} is not UTF-8") from error
    if "\0" in text:
        for line in block.lines():
            _refuse_nul(line.content.decode(), line.where(part))
    return text


def _blocks(part: Part) -> Iterator[_Block]:
    """A part of a file, `PIECE` bytes and the rest of their last line at a time.

    Raises `InputFileError` for a byte order mark, UTF-16, and a line that is too long for a text.
    """
    file, packed = part.file, is_packed(part.file)
    place, number = part.start, 1
    with _opened(file) as (stream, raw):
        if not part.start:
            refuse_marks(stream.peek(4096)[:4096], file)
        else:
            stream.seek(part.start)
        while packed or place < part.stop:
            left = MAX_LINE + PIECE if packed else part.stop - place
            content = stream.read(min(PIECE, MAX_LINE, left))
            if not content:
                break
            if not content.endswith(b"\n"):
                content += stream.readline(min(MAX_LINE + 1, left - len(content)))
            done = raw.tell() if packed else place + len(content) - part.start
            block = _Block(content, place, number, min(1.0, done / (part.stop - part.start)))
            if len(content) - (last := content.rfind(b"\n", 0, -1) + 1) > MAX_LINE:  # no other line can be as long
                line = block._replace(place=place + last, number=number + content.count(b"\n", 0, last))
                raise InputFileError(f"{line.where(part)} is longer than {MAX_LINE:,} bytes: this is no text")
            yield block
            place, number = place + len(content), number + content.count(b"\n")


def border(file: Path, at: int) -> int:
    """The first byte after `at - 1` where a plain file may be divided: a JSON line begins, or see `CUT`; or its end.

    A line that is too long, or no UTF-8, is left whole for its reader to refuse.
    """
    size = file.stat().st_size
    with file.open("rb") as raw:
        raw.seek(at - 1)
        line, before = raw.readline(MAX_LINE + 1), ""
        place = at - 1 + len(line)
        while len(line) <= MAX_LINE and place < size:
            if is_jsonl(file):
                return place
            line = raw.readline(MAX_LINE + 1)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                return size
            if re.search(r"\S\r?\n$", before) and re.match(r"\S", text):
                return place
            if match := CUT.search(text):
                return place + len(text[: match.start()].encode())
            place, before = place + len(line), text
    return size


@contextmanager
def _opened(file: Path) -> Iterator[tuple[io.BufferedReader, BinaryIO]]:
    """A file's bytes, uncompressed, and the file as it lies on the disk."""
    suffix = file.suffix.lower()
    try:
        with file.open("rb") as raw:
            if suffix == ".gz":
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20), raw  # pyright: ignore[reportArgumentType]
            elif suffix == ".zst":
                arrow = need("pyarrow", file, extra="data")
                yield io.BufferedReader(arrow.CompressedInputStream(raw, "zstd"), 1 << 20), raw
            else:
                yield raw, raw
    except (OSError, EOFError, zlib.error) as error:
        doing = "decompressed" if suffix in PACKED else "read"
        raise InputFileError(f"{file}: cannot be {doing}: {one_line(error)}") from error


def _refuse_nul(text: str, where: str) -> None:
    if (place := text.find("\0")) >= 0:
        raise InputFileError(f"{where}: character {place} is NUL: this is no text")


# ---------------------------------------------------------------------------------------------------- Parquet


def parquet(file: Path) -> Any:
    """An opened Parquet file, read a page at a time; raises `InputFileError` if it is none."""
    reader = need("pyarrow.parquet", file, extra="data")
    try:
        return reader.ParquetFile(file, memory_map=False, buffer_size=1 << 20, pre_buffer=False)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise InputFileError(f"{file}: not a readable Parquet file: {one_line(error)}") from error


def text_column(opened: Any, file: Path, column: str) -> int:
    """The number of the column of text; raises `InputFileError` naming the columns there are."""
    names = opened.schema_arrow.names
    if names.count(column) != 1:
        raise InputFileError(f"{file}: has no column {column!r}, only {shown(names)}: --text-column names another")
    kind = opened.schema_arrow.field(column).type
    if str(kind) not in ("string", "large_string", "string_view"):
        raise InputFileError(f"{file}: column {column!r} is of type {kind}, not a string")
    leaves = [opened.schema.column(i).path for i in range(len(opened.schema))]
    return leaves.index(column)


def _rows(part: Part, column: str) -> Iterator[Passage]:
    opened, file = parquet(part.file), part.file
    text_column(opened, file, column)
    metadata = opened.metadata
    counts = [metadata.row_group(i).num_rows for i in range(part.stop)]
    first, row = sum(counts[: part.start]), 0
    rows = max(1, sum(counts[part.start :]))
    groups = list(range(part.start, part.stop))
    try:
        for batch in opened.iter_batches(batch_size=64, row_groups=groups, columns=[column], use_threads=False):
            for value in batch.column(0):
                where, row = f"{file}: row {first + row + 1}", row + 1
                if (text := value.as_py()) is None:
                    raise InputFileError(f"{where}: {column!r} is null")
                _refuse_nul(text, f"{where}: {column!r}")
                yield Passage(text, True, where, row / rows)
    except UnicodeDecodeError as error:
        raise InputFileError(f"{file}: row {first + row}: {column!r} is not UTF-8") from error
    except InputFileError:
        raise
    except (OSError, ValueError) as error:
        raise InputFileError(f"{file}: not a readable Parquet file: {one_line(error)}") from error
