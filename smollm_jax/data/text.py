"""Reads documents, or chunks of long ones, from text files, one block of lines, JSON value or page at a time.

`file_types` detects a file's type, `text_sources` selects the files of a folder, and `bad_text` handles text without
tokens. Memory is bounded by `MAX_LINE`, whatever a file contains.
"""

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from smollm_jax.data import text_tables
from smollm_jax.data.bad_text import BadTextError, BadTextHandler
from smollm_jax.data.compression import open_decompressed
from smollm_jax.data.file_types import (
    ARROW,
    CSV,
    JSON,
    JSON_LINES,
    PARQUET,
    TSV,
    FileSlice,
    FileType,
    TextChunk,
    detect_file_type,
)  # fmt: skip
from smollm_jax.data.text_sources import text_files as text_files
from smollm_jax.errors import InputFileError
from smollm_jax.runtime.files import parse_json, reject_utf16

MAX_LINE = 16 << 20  # bytes; a whole book has 1 MB
PIECE = 1 << 16  # characters in a chunk of a long text, and bytes in a read
# Positions at which SmolLM2's pre-tokenizer (Digits, then GPT-2's pattern) splits in any context: a single space
# between two other characters. A run of spaces would be split differently at the end of a text.
CUT = re.compile(r"(?<=\S)[ \n\t](?=\S)")
NOT_BLANK = re.compile(rb"\S[^\n]*")  # what a line has from its first character on that is no white space
DELIMITERS = {CSV: ",", TSV: "\t"}
# A file is binary if more of its first bytes than this share and this number are not text.
BINARY_SHARE, BINARY_BYTES = 0.3, 16


def documents(file: Path, column: str = "text", bad_text: BadTextHandler | None = None) -> Iterator[str]:
    """The documents of one file: its whole text, or the text of each line, row or object."""
    texts: list[str] = []
    for chunk in text_chunks(whole_file(file), column, cut=False, bad_text=bad_text):
        texts.append(chunk.text)
        if chunk.ends:
            yield "".join(texts)
            texts = []


def whole_file(file: Path) -> FileSlice:
    """The slice that is all of a file."""
    is_parquet = detect_file_type(file).form == PARQUET
    return FileSlice(file, 0, text_tables.open_parquet(file).num_row_groups if is_parquet else file.stat().st_size)


def text_chunks(
    file_slice: FileSlice, column: str = "text", *, cut: bool = True, bad_text: BadTextHandler | None = None
) -> Iterator[TextChunk]:
    """The documents of a file slice, a long plain text in several chunks if `cut`.

    Line ends of plain text become a newline, as when Python reads text. Where `bad_text` skips a plain text, it skips
    the whole slice.
    """
    file, file_type, bad_text = file_slice.file, detect_file_type(file_slice.file), bad_text or BadTextHandler()
    if file_type.form == PARQUET:
        return text_tables.parquet_rows(file_slice, column, bad_text, MAX_LINE)
    if file_type.form == ARROW:
        return text_tables.arrow_rows(file, column, bad_text, MAX_LINE)
    if file_type.form == JSON:
        return text_tables.json_documents(
            _characters(file_slice, file_type, bad_text), file, column, bad_text, MAX_LINE
        )
    if file_type.form in DELIMITERS:
        delimiter = DELIMITERS[file_type.form]
        lines = _lines(file_slice, file_type, bad_text)
        return text_tables.csv_rows(lines, file, delimiter, column, bad_text, MAX_LINE)
    if file_type.form == JSON_LINES:
        return _json_lines(file_slice, file_type, column, bad_text)
    read_plain = _plain_or_skipped if bad_text.policy == "skip" else _plain
    return read_plain(file_slice, file_type, cut, bad_text)


def _plain_or_skipped(
    file_slice: FileSlice, file_type: FileType, cut: bool, bad_text: BadTextHandler
) -> Iterator[TextChunk]:
    """The chunks of a plain text, or none if any of it is bad. Reads it twice: bad text may follow a good chunk."""
    try:
        for _ in _plain(file_slice, file_type, cut, BadTextHandler("stop", bad_text.unencodable)):
            pass
    except BadTextError:
        bad_text.skipped += 1
        return
    yield from _plain(file_slice, file_type, cut, bad_text)


def _plain(file_slice: FileSlice, file_type: FileType, cut: bool, bad_text: BadTextHandler) -> Iterator[TextChunk]:
    file = file_slice.file
    where, ends = f"{file}: document 1", file_slice.stop == file.stat().st_size
    texts: list[str] = []
    length, limit = 0, PIECE
    for block in _blocks(file_slice, file_type):
        if bad_text.policy == "replace" and not file_slice.start and block.line_number == 1:
            _refuse_binary(block.content[:4096], file)
        texts.append(_decode_block(file_slice, block, bad_text).replace("\r\n", "\n").replace("\r", "\n"))
        length += len(texts[-1])
        if not cut or length < limit:
            continue
        text = "".join(texts)
        cuts = [m.start() for m in CUT.finditer(text, len(text) - 4096)] or [m.start() for m in CUT.finditer(text)]
        if cuts:
            if chunk := bad_text.clean(text[: cuts[-1]], where):
                yield TextChunk(chunk, False, where, block.position)
            where = f"{file}: document 1, {block.position:.0%} into it"
            texts, length, limit = [text[cuts[-1] :]], len(text) - cuts[-1], PIECE
        elif length > MAX_LINE:
            raise InputFileError(
                f"{file}: no single space between two words in {MAX_LINE:,} bytes, so this is not text"
            )
        else:
            limit = 2 * length
    if text := bad_text.clean("".join(texts), where):
        yield TextChunk(text, ends, where, 1.0)


def _refuse_binary(head: bytes, file: Path) -> None:
    """Raises `InputFileError` when too many of a file's first bytes are control characters or not UTF-8."""
    text = head.decode(errors="ignore")
    not_text = len(head) - len(text.encode()) + sum(c < " " and c not in "\t\n\r\f\b\x1b" for c in text)
    if not_text > max(BINARY_SHARE * len(head), BINARY_BYTES):
        reason = f"{not_text} of its first {len(head)} bytes are not UTF-8 text"
        raise InputFileError(f"{file}: looks like binary data or another encoding: {reason}")


def _json_lines(
    file_slice: FileSlice, file_type: FileType, column: str, bad_text: BadTextHandler
) -> Iterator[TextChunk]:
    for block in _blocks(file_slice, file_type):
        for line in block.lines():
            text = bad_text.decode(line.content, file_slice.file, line.offset)
            if not text.strip():
                continue
            where = line.where(file_slice)
            if "\0" in text and (text := bad_text.clean(text, where)) is None:
                continue
            value = text_tables.text_of(parse_json(text, where, finite=False), column, where, bad_text)
            if (value := bad_text.clean(value, where, f": {column!r}")) is not None:
                yield TextChunk(value, True, where, line.position)


def _lines(file_slice: FileSlice, file_type: FileType, bad_text: BadTextHandler) -> text_tables.Lines:
    """The lines of a table with their line ends, which may be a lone carriage return."""
    for block in _blocks(file_slice, file_type):
        for line in io.StringIO(bad_text.decode(block.content, file_slice.file, block.offset), newline=""):
            yield line, block.position


def _characters(file_slice: FileSlice, file_type: FileType, bad_text: BadTextHandler) -> text_tables.Lines:
    """The text of a file, `PIECE` bytes at a time, regardless of lines."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape" if bad_text.policy != "stop" else "strict")
    offset = 0

    def decode(content: bytes) -> str:
        incomplete, _ = decoder.getstate()
        try:
            return decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            byte = offset - len(content) - len(incomplete) + error.start
            raise bad_text.error(f"{file_slice.file}: byte {byte} is not UTF-8") from error

    with open_decompressed(file_slice.file, file_type.compression) as (stream, raw):
        offset = _skip_bom(stream, file_slice.file)
        while content := stream.read(PIECE):
            offset += len(content)
            done = raw.tell() if file_type.compression else offset
            yield decode(content), min(1.0, done / file_slice.stop)
        yield decode(b""), 1.0


def records(file: Path) -> Iterator[tuple[str, Any]]:
    """The values of a file of rows, each with where it stands: objects of JSON, or a dictionary for a table's row.

    Raises `InputFileError` for a plain text.
    """
    file_slice, file_type, bad_text = whole_file(file), detect_file_type(file), BadTextHandler()
    if file_type.form == PARQUET:
        yield from text_tables.parquet_records(file, MAX_LINE)
    elif file_type.form == ARROW:
        yield from text_tables.arrow_records(file)
    elif file_type.form == JSON:
        values = text_tables.json_values(_characters(file_slice, file_type, bad_text), file, MAX_LINE)
        for number, (content, _, in_array) in enumerate(values, 1):
            where = f"{file}: {'element' if in_array else 'object'} {number}"
            yield where, parse_json(content, where, finite=False)
    elif file_type.form in DELIMITERS:
        lines = _lines(file_slice, file_type, bad_text)
        yield from text_tables.csv_records(lines, file, DELIMITERS[file_type.form], MAX_LINE)
    elif file_type.form == JSON_LINES:
        for block in _blocks(file_slice, file_type):
            for line in block.lines():
                if (text := bad_text.decode(line.content, file, line.offset)).strip():
                    yield line.where(file_slice), parse_json(text, line.where(file_slice), finite=False)
    else:
        raise InputFileError(f"{file}: is plain text, not rows: give .jsonl, .json, .parquet, .arrow, .csv or .tsv")


class _Block(NamedTuple):
    """Whole lines of a file; the last line of a slice may be cut."""

    content: bytes
    offset: int  # of its first byte in the file
    line_number: int  # of its first line, counted from 1 at the start of the slice
    position: float  # the fraction of the slice up to its end, 0 to 1

    def lines(self) -> "Iterator[_Block]":
        """Each line that is not blank, without its line end; a gigabyte of blank ones is small when compressed."""
        line_number, counted = self.line_number, 0
        for match in NOT_BLANK.finditer(self.content):
            start = self.content.rfind(b"\n", 0, match.start()) + 1
            line_number, counted = line_number + self.content.count(b"\n", counted, start), start
            yield _Block(self.content[start : match.end()], self.offset + start, line_number, self.position)

    def where(self, file_slice: FileSlice) -> str:
        """The file and the line where it begins, for error messages."""
        line = f"the line at byte {self.offset}" if file_slice.start else f"line {self.line_number}"
        return f"{file_slice.file}: {line}"


def _decode_block(file_slice: FileSlice, block: _Block, bad_text: BadTextHandler) -> str:
    """The text of a block; under the policy "stop" `BadTextError` names the byte, or the line that contains NUL."""
    text = bad_text.decode(block.content, file_slice.file, block.offset)
    if "\0" in text and bad_text.policy == "stop":
        for line in block.lines():
            bad_text.clean(line.content.decode(), line.where(file_slice))
    return text


def _blocks(file_slice: FileSlice, file_type: FileType) -> Iterator[_Block]:
    """Blocks of a file slice, each `PIECE` bytes and the remainder of the last line.

    Raises `InputFileError` for UTF-16, and for a line that is too long.
    """
    file, compressed = file_slice.file, bool(file_type.compression)
    offset, line_number = file_slice.start, 1
    with open_decompressed(file, file_type.compression) as (stream, raw):
        if not file_slice.start:
            offset = _skip_bom(stream, file)
        else:
            stream.seek(file_slice.start)
        while compressed or offset < file_slice.stop:
            remaining = MAX_LINE + PIECE if compressed else file_slice.stop - offset
            content = stream.read(min(PIECE, MAX_LINE, remaining))
            if not content:
                break
            if not content.endswith(b"\n"):
                content += stream.readline(min(MAX_LINE + 1, remaining - len(content)))
            done = raw.tell() if compressed else offset + len(content) - file_slice.start
            position = min(1.0, done / (file_slice.stop - file_slice.start))
            block = _Block(content, offset, line_number, position)
            last_line = content.rfind(b"\n", 0, -1) + 1
            if len(content) - last_line > MAX_LINE:  # no other line can be as long
                lines_before = content.count(b"\n", 0, last_line)
                line = block._replace(offset=offset + last_line, line_number=line_number + lines_before)
                where = line.where(file_slice)
                raise InputFileError(f"{where} is longer than {MAX_LINE:,} bytes, so this is not text")
            yield block
            offset, line_number = offset + len(content), line_number + content.count(b"\n")


def _skip_bom(stream: io.BufferedReader, file: Path) -> int:
    """Skips a UTF-8 byte order mark at the start, as Python's utf-8-sig does; returns its length, 0 or 3.

    Windows editors and spreadsheets write one. Raises `InputFileError` for UTF-16.
    """
    head = stream.peek(4096)[:4096]
    length = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    stream.read(length)
    reject_utf16(head[length:], file)
    return length


def find_cut(file: Path, file_type: FileType, at: int) -> int:
    """The first offset from `at` on where a file may be divided, or its size if there is none.

    JSON lines are divided between lines, plain text at a `CUT`. A file is not divided after a line that is too long or
    not UTF-8: whoever reads it reports that line.
    """
    size = file.stat().st_size
    with file.open("rb") as raw:
        raw.seek(at - 1)
        line, previous = raw.readline(MAX_LINE + 1), ""
        offset = at - 1 + len(line)
        while len(line) <= MAX_LINE and offset < size:
            if file_type.form == JSON_LINES:
                return offset
            line = raw.readline(MAX_LINE + 1)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                return size
            if re.search(r"\S\r?\n$", previous) and re.match(r"\S", text):
                return offset
            if match := CUT.search(text):
                return offset + len(text[: match.start()].encode())
            offset, previous = offset + len(line), text
    return size
