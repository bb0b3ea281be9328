"""Documents out of tables and JSON values: CSV, TSV, an array or objects of JSON, Parquet, Arrow.

A column of null is what `bad_text` makes of it; a column that is missing or no string is refused.
"""

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smollm_jax.data.bad_text import BadText
from smollm_jax.data.text_kinds import Part, Passage
from smollm_jax.errors import InputFileError, short_repr
from smollm_jax.runtime.files import import_optional, one_line, parse_json

CONVERSATIONS = {"messages", "conversations", "conversation"}  # keys of rows that are chats, not text
RENDER = "{} is a conversation, which is to be rendered to text by a chat template first: docs/data.md"
STRINGS = ("string", "large_string", "string_view")
Lines = Iterator[tuple[str, float]]  # each with its line end, and how much of the file is read by then


def _lacking(column: str, names: list[str]) -> str:
    chat = next((f"; {RENDER.format(repr(name))}" for name in names if name in CONVERSATIONS), "")
    other = "--text-column (prepare_data.py, evaluate.py) names another"
    return f"has no column {column!r}, only {short_repr(names)}: {other}{chat}"


# --------------------------------------------------------------------------------------------------- CSV and TSV


def csv_rows(lines: Lines, file: Path, delimiter: str, column: str, bad: BadText, limit: int) -> Iterator[Passage]:
    """The text of each row below the header; a field has at most `limit` characters."""
    csv.field_size_limit(limit)
    position, number, header, place = 0.0, 1, None, 0

    def texts() -> Iterator[str]:
        nonlocal position
        for line, position in lines:  # noqa: B007
            yield line

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            where, number = f"{file}: line {number}", reader.line_num + 1
            if not row:  # a blank line
                continue
            if header is None:
                header = row
                if row.count(column) != 1:
                    other = next((mark for mark in ",;\t|" if len(row) == 1 and mark in row[0]), None)
                    save = f"; its fields are divided by {other!r}: save it with {delimiter!r}" if other else ""
                    raise InputFileError(f"{file}: {_lacking(column, row)}{save}")
                place = row.index(column)
                continue
            if len(row) > len(header):
                raise InputFileError(f"{where} has {len(row)} fields, the header {len(header)}")
            text = bad.checked(row[place] if place < len(row) else None, where, f": {column!r}")
            if text is not None:
                yield Passage(text, True, where, position)
    except csv.Error as error:
        raise InputFileError(f"{file}: the row that begins in line {number}: {one_line(error)}") from error


# --------------------------------------------------------------------------------------------------- JSON values


def json_documents(chunks: Lines, file: Path, column: str, bad: BadText, limit: int) -> Iterator[Passage]:
    """The text of each object, or each string, of an array, or of objects that follow one another."""
    for number, (content, position, array) in enumerate(_values(chunks, file, limit), 1):
        where = f"{file}: {'element' if array else 'object'} {number}"
        value = parse_json(content, where, finite=False)
        text = value if array and isinstance(value, str) else text_of(value, column, where, bad)
        if (text := bad.checked(text, where, f": {column!r}")) is not None:
            yield Passage(text, True, where, position)


def text_of(value: Any, column: str, where: str, bad: BadText) -> str | None:
    """The text of a JSON object, or None for null; raises `InputFileError` for another type or value.

    Where null is left out, so is an object without the field, which is null to Hugging Face's datasets.
    """
    if isinstance(value, dict) and column not in value and bad.policy != "stop":
        return None
    if isinstance(value, dict) and column in value and type(value[column]) in (str, type(None)):
        return value[column]
    reason = ""
    if isinstance(value, dict) and column in value:
        reason = f": it is {short_repr(value[column])}"
    elif isinstance(value, dict):
        reason = f": it {_lacking(column, list(value))}"
    raise InputFileError(f"{where} is no JSON object with a {column!r} that is a string{reason}")


class _Buffer:
    """Characters that come in chunks, and the place in them that is read up to."""

    def __init__(self, chunks: Lines, limit: int):
        self._chunks, self._limit = chunks, limit
        self.text, self.place, self.position, self.ended = "", 0, 0.0, False

    def more(self) -> None:
        """Four times the characters that are not read yet, so that a value is not tried for each of its chunks."""
        pieces = [self.text[self.place :]]
        wanted = min(4 * len(pieces[0]), self._limit) + 1
        while sum(map(len, pieces)) < wanted and not self.ended:
            chunk, self.position = next(self._chunks, (None, 1.0))
            self.ended = chunk is None
            pieces.append(chunk or "")
        self.text, self.place = "".join(pieces), 0

    def next(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            window = self.text[self.place : self.place + 64].lstrip(" \t\r\n")
            if window:
                self.place = self.text.index(window[0], self.place)
                return window[0]
            if self.place + 64 < len(self.text):
                self.place += 64
                continue
            self.place = len(self.text)
            if self.ended:
                return ""
            self.more()


def _values(chunks: Lines, file: Path, limit: int) -> Iterator[tuple[str, float, bool]]:
    """The JSON of each value, how much of the file is read by then, and whether the values are those of an array."""
    buffer, decoder = _Buffer(chunks, limit), json.JSONDecoder()
    if array := buffer.next() == "[":
        buffer.place += 1
    for number in itertools.count(1):
        if not (first := buffer.next()) or (array and number == 1 and first == "]"):
            break
        while True:
            try:
                _, end = decoder.raw_decode(buffer.text, buffer.place)
                break
            except (ValueError, RecursionError) as error:
                where = f"{file}: {'element' if array else 'object'} {number}"
                if buffer.ended or isinstance(error, RecursionError):
                    parse_json(buffer.text[buffer.place :], where)  # says what is wrong, and where
                    raise InputFileError(f"{where}: not readable as JSON: {one_line(error)}") from error
                if len(buffer.text) - buffer.place > limit:
                    raise InputFileError(f"{where} is longer than {limit:,} characters: this is no text") from error
                buffer.more()
        yield buffer.text[buffer.place : end], buffer.position, array
        buffer.place = end
        if array:
            if buffer.next() == "]":
                break
            if buffer.next() != ",":
                raise InputFileError(f"{file}: element {number} of its array is followed by neither , nor ]")
            buffer.place += 1
    if array:
        if buffer.next() != "]":
            raise InputFileError(f"{file}: ends within its array")
        buffer.place += 1
    if buffer.next():
        raise InputFileError(f"{file}: goes on after its array")


# -------------------------------------------------------------------------------------------- Parquet and Arrow


def parquet(file: Path) -> Any:
    """An opened Parquet file, read a page at a time; raises `InputFileError` if it is none."""
    reader = import_optional("pyarrow.parquet", file, extra="data")
    try:
        return reader.ParquetFile(file, memory_map=False, buffer_size=1 << 20, pre_buffer=False)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise InputFileError(f"{file}: not a readable Parquet file: {one_line(error)}") from error


def text_column(opened: Any, file: Path, column: str) -> int:
    """The number of Parquet's column of text; raises `InputFileError` naming the columns there are."""
    _check_column(opened.schema_arrow, file, column)
    leaves = [opened.schema.column(i).path for i in range(len(opened.schema))]
    return leaves.index(column)


def _check_column(schema: Any, file: Path, column: str) -> None:
    """Raises `InputFileError` when a schema has no such column of strings, which may be those of a dictionary."""
    if schema.names.count(column) != 1:
        raise InputFileError(f"{file}: {_lacking(column, schema.names)}")
    kind = schema.field(column).type
    if str(kind) not in STRINGS and str(getattr(kind, "value_type", "")) not in STRINGS * str(kind).startswith("dict"):
        raise InputFileError(f"{file}: column {column!r} is of type {kind}, not a string")


def parquet_rows(part: Part, column: str, bad: BadText) -> Iterator[Passage]:
    """The text of each row of some row groups."""
    opened, file = parquet(part.file), part.file
    text_column(opened, file, column)
    counts = [opened.metadata.row_group(i).num_rows for i in range(part.stop)]
    first, rows = sum(counts[: part.start]), max(1, sum(counts[part.start :]))
    groups = list(range(part.start, part.stop))
    try:
        batches = opened.iter_batches(batch_size=64, row_groups=groups, columns=[column], use_threads=False)
        columns = (batch.column(0) for batch in batches)
        for number, text in enumerate(_texts(columns, file, column, bad, first), 1):
            if text is not None:
                yield Passage(text, True, f"{file}: row {first + number}", number / rows)
    except InputFileError:
        raise
    except (OSError, ValueError) as error:
        raise InputFileError(f"{file}: not a readable Parquet file: {one_line(error)}") from error


def arrow_rows(file: Path, column: str, bad: BadText) -> Iterator[Passage]:
    """The text of each row of an Arrow file or stream, as `datasets.Dataset.save_to_disk` writes it."""
    arrow = import_optional("pyarrow", file, extra="data")
    ipc = import_optional("pyarrow.ipc", file, extra="data")
    try:
        # Mapped, so that a length in the file cannot ask for memory.
        with arrow.memory_map(str(file)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            opened = (ipc.open_file if is_file else ipc.open_stream)(source)
            _check_column(opened.schema, file, column)
            numbers = range(opened.num_record_batches) if is_file else itertools.repeat(None)
            columns = _checked_columns(opened, numbers, column)
            size = file.stat().st_size
            for number, text in enumerate(_texts(columns, file, column, bad, 0), 1):
                if text is not None:
                    yield Passage(text, True, f"{file}: row {number}", 1.0 if is_file else source.tell() / size)
    except InputFileError:
        raise
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise InputFileError(f"{file}: not a readable Arrow file: {one_line(error)}") from error


def _checked_columns(opened: Any, numbers: Any, column: str) -> Iterator[Any]:
    """The column of each record batch, whose offsets are checked: pyarrow would read wherever they point."""
    for number in numbers:
        try:
            batch = opened.read_next_batch() if number is None else opened.get_batch(number)
        except StopIteration:
            return
        values = batch.column(opened.schema.names.index(column))
        values.validate(full=True)
        yield values


def _texts(columns: Iterator[Any], file: Path, column: str, bad: BadText, first: int) -> Iterator[str | None]:
    """The text of each row, None for one that is left out."""
    row = first
    for values in columns:
        for value in values:
            row += 1
            where = f"{file}: row {row}"
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                if bad.policy == "stop":
                    raise bad.error(f"{where}: {column!r} is not UTF-8") from error
                content = getattr(value, "value", value).as_buffer().to_pybytes()
                text = bad.decoded(content, file, 0)
            yield bad.checked(text, where, f": {column!r}")
