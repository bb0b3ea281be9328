"""Text out of files: documents, or pieces of long ones. Read a block of lines, a value or a page at a time.

What a file is, is decided by `text_kinds`, which files a folder means by `text_sources`, what becomes of a text without
tokens by `bad_text`. Memory is bounded by `MAX_LINE`, whatever a file holds.
"""

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from smollm_jax.data import text_tables
from smollm_jax.data.bad_text import BadText, BadTextError
from smollm_jax.data.compression import opened
from smollm_jax.data.text_kinds import ARROW, CSV, JSON, JSON_LINES, PARQUET, TSV, Kind, Part, Passage, kind_of
from smollm_jax.data.text_sources import text_files as text_files
from smollm_jax.errors import InputFileError
from smollm_jax.runtime.files import parse_json, reject_utf16

MAX_LINE = 16 << 20  # bytes; a whole book has 1 MB
PIECE = 1 << 16  # characters of a long text that are encoded at once, and bytes that are read at once
# Where SmolLM2's pre-tokenizer (Digits, then GPT-2's pattern) ends a word whatever lies around: before or, a newline,
# after one space between two characters that are none. A run of spaces would be split differently at a text's end.
CUT = re.compile(r"(?<=\S)[ \n\t](?=\S)")
DELIMITERS = {CSV: ",", TSV: "\t"}
BINARY = 0.3, 16  # the share and number of a file's first bytes that are no text, where replacing them makes none


def documents(file: Path, column: str = "text", bad: BadText | None = None) -> Iterator[str]:
    """The documents of one file: its whole text, or the text of each line, row or object."""
    pieces: list[str] = []
    for passage in passages(whole(file), column, cut=False, bad=bad):
        pieces.append(passage.text)
        if passage.ends:
            yield "".join(pieces)
            pieces = []


def whole(file: Path) -> Part:
    """All of a file."""
    is_parquet = kind_of(file).form == PARQUET
    return Part(file, 0, text_tables.parquet(file).num_row_groups if is_parquet else file.stat().st_size)


def passages(part: Part, column: str = "text", *, cut: bool = True, bad: BadText | None = None) -> Iterator[Passage]:
    """What a part of a file says, a document at a time; a long plain text in pieces if they may be `cut`.

    Line ends of plain text become a newline, as in Python's own reading of text. `bad` counts what it leaves out: of a
    plain text, all of the part.
    """
    kind, bad = kind_of(part.file), bad or BadText()
    file = part.file
    if kind.form == PARQUET:
        return text_tables.parquet_rows(part, column, bad)
    if kind.form == ARROW:
        return text_tables.arrow_rows(file, column, bad)
    if kind.form == JSON:
        return text_tables.json_documents(_chunks(part, kind, bad), file, column, bad, MAX_LINE)
    if kind.form in DELIMITERS:
        delimiter = DELIMITERS[kind.form]
        return text_tables.csv_rows(_lines(part, kind, bad), file, delimiter, column, bad, MAX_LINE)
    if kind.form == JSON_LINES:
        return _json_lines(part, kind, column, bad)
    return _plain_or_none(part, kind, cut, bad) if bad.policy == "skip" else _plain(part, kind, cut, bad)


def _plain_or_none(part: Part, kind: Kind, cut: bool, bad: BadText) -> Iterator[Passage]:
    """A plain text if all of it can be encoded: it is read twice, for its beginning is used before its end is known."""
    try:
        for _ in _plain(part, kind, cut, BadText("stop", bad.unencodable)):
            pass
    except BadTextError:
        bad.skipped += 1
        return
    yield from _plain(part, kind, cut, bad)


def _plain(part: Part, kind: Kind, cut: bool, bad: BadText) -> Iterator[Passage]:
    where, ends = f"{part.file}: document 1", part.stop == part.file.stat().st_size
    texts: list[str] = []
    length, limit = 0, PIECE
    for block in _blocks(part, kind):
        if bad.policy == "replace" and not part.start and block.number == 1:
            _refuse_binary(block.content[:4096], part.file)
        texts.append(_decoded(part, block, bad).replace("\r\n", "\n").replace("\r", "\n"))
        length += len(texts[-1])
        if not cut or length < limit:
            continue
        text = "".join(texts)
        places = [m.start() for m in CUT.finditer(text, len(text) - 4096)] or [m.start() for m in CUT.finditer(text)]
        if places:
            if piece := bad.checked(text[: places[-1]], where):
                yield Passage(piece, False, where, block.position)
            where = f"{part.file}: document 1, {block.position:.0%} into it"
            texts, length, limit = [text[places[-1] :]], len(text) - places[-1], PIECE
        elif length > MAX_LINE:
            raise InputFileError(f"{part.file}: no lone space between two words in {MAX_LINE:,} bytes: this is no text")
        else:
            limit = 2 * length
    if text := bad.checked("".join(texts), where):
        yield Passage(text, ends, where, 1.0)


def _refuse_binary(head: bytes, file: Path) -> None:
    """Raises `InputFileError` when too many of a file's first bytes are control characters or no UTF-8."""
    text = head.decode(errors="ignore")
    strange = len(head) - len(text.encode()) + sum(c < " " and c not in "\t\n\r\f\b\x1b" for c in text)
    if strange > max(BINARY[0] * len(head), BINARY[1]):
        reason = f"{strange} of its first {len(head)} bytes are no UTF-8 text"
        raise InputFileError(f"{file}: looks like binary data or another encoding: {reason}")


def _json_lines(part: Part, kind: Kind, column: str, bad: BadText) -> Iterator[Passage]:
    for block in _blocks(part, kind):
        for line in block.lines():
            text = bad.decoded(line.content, part.file, line.place)
            if not text.strip():
                continue
            where = line.where(part)
            if "\0" in text and (text := bad.checked(text, where)) is None:
                continue
            value = text_tables.text_of(parse_json(text, where, finite=False), column, where, bad)
            if (value := bad.checked(value, where, f": {column!r}")) is not None:
                yield Passage(value, True, where, line.position)


def _lines(part: Part, kind: Kind, bad: BadText) -> text_tables.Lines:
    """The lines of a table, with their ends, which may be a carriage return alone."""
    for block in _blocks(part, kind):
        for line in io.StringIO(bad.decoded(block.content, part.file, block.place), newline=""):
            yield line, block.position


def _chunks(part: Part, kind: Kind, bad: BadText) -> text_tables.Lines:
    """The text of a file, `PIECE` bytes at a time, wherever its lines end."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape" if bad.policy != "stop" else "strict")
    place = 0

    def decoded(content: bytes) -> str:
        before, _ = decoder.getstate()
        try:
            return decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            byte = place - len(content) - len(before) + error.start
            raise bad.error(f"{part.file}: byte {byte} is not UTF-8") from error

    with opened(part.file, kind.packing) as (stream, raw):
        place = _skip_mark(stream, part.file)
        while content := stream.read(PIECE):
            place += len(content)
            done = raw.tell() if kind.packing else place
            yield decoded(content), min(1.0, done / part.stop)
        yield decoded(b""), 1.0


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


def _decoded(part: Part, block: _Block, bad: BadText) -> str:
    """The text of a block; where bad text stops the reading, `BadTextError` names the byte, or the line with a NUL."""
    text = bad.decoded(block.content, part.file, block.place)
    if "\0" in text and bad.policy == "stop":
        for line in block.lines():
            bad.checked(line.content.decode(), line.where(part))
    return text


def _blocks(part: Part, kind: Kind) -> Iterator[_Block]:
    """A part of a file, `PIECE` bytes and the rest of their last line at a time.

    Raises `InputFileError` for UTF-16, and for a line that is too long.
    """
    file, packed = part.file, bool(kind.packing)
    place, number = part.start, 1
    with opened(file, kind.packing) as (stream, raw):
        if not part.start:
            place = _skip_mark(stream, file)
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


def _skip_mark(stream: io.BufferedReader, file: Path) -> int:
    """The bytes of the UTF-8 byte order mark a file begins with, 0 or 3, which are left out as by Python's utf-8-sig.

    Editors on Windows and spreadsheets write one. Raises `InputFileError` for UTF-16.
    """
    head = stream.peek(4096)[:4096]
    mark = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    stream.read(mark)
    reject_utf16(head[mark:], file)
    return mark


def border(file: Path, kind: Kind, at: int) -> int:
    """The first byte after `at - 1` where a file may be divided: a JSON line begins, or see `CUT`; or its end.

    A line that is too long, or no UTF-8, is left whole for its reader to refuse.
    """
    size = file.stat().st_size
    with file.open("rb") as raw:
        raw.seek(at - 1)
        line, before = raw.readline(MAX_LINE + 1), ""
        place = at - 1 + len(line)
        while len(line) <= MAX_LINE and place < size:
            if kind.form == JSON_LINES:
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
