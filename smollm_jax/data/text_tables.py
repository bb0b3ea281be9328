"""Reads documents from tables and JSON values: CSV, TSV, an array or objects of JSON, Parquet, Arrow.

`bad_text` decides about null; a text column that is missing or not a string is an error.
"""

import contextlib
import csv
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from smollm_jax.data.bad_text import BadTextHandler
from smollm_jax.data.file_types import FileSlice, TextChunk
from smollm_jax.data.parquet_footer import column_sizes
from smollm_jax.errors import InputFileError, short_repr
from smollm_jax.runtime.files import import_optional, one_line, parse_json

CONVERSATIONS = {"messages", "conversations", "conversation"}  # column names of chats
RENDER = "{} is a conversation: learn it with finetune.py, or render it to text by its chat template (docs/data.md)"
STRINGS = ("string", "large_string", "string_view")
EXPANSION = 1000  # times as large as compressed: more is no text, if it is more than a batch
PAGE_OVERHEAD = 1 << 20  # bytes: headers with statistics, lengths and levels
Lines = Iterator[tuple[str, float]]  # each with its line end, and the fraction of the file that is read


def _missing_column(column: str, names: list[str]) -> str:
    chat = next((f"; {RENDER.format(repr(name))}" for name in names if name in CONVERSATIONS), "")
    advice = "choose one with --text-column (prepare_data.py, evaluate.py)"
    return f"has no column {column!r}, only {short_repr(names)}: {advice}{chat}"


# --------------------------------------------------------------------------------------------------- CSV and TSV


def csv_rows(
    lines: Lines, file: Path, delimiter: str, column: str, bad_text: BadTextHandler, limit: int
) -> Iterator[TextChunk]:
    """The text of each row below the header; a field has at most `limit` characters."""
    header, index = None, 0
    for where, row, position in _csv_lines(lines, file, delimiter, limit):
        if header is None:
            header = row
            if row.count(column) != 1:
                other = next((mark for mark in ",;\t|" if len(row) == 1 and mark in row[0]), None)
                advice = f"; its delimiter is {other!r}: save it with {delimiter!r}" if other else ""
                raise InputFileError(f"{file}: {_missing_column(column, row)}{advice}")
            index = row.index(column)
            continue
        text = bad_text.clean(row[index] if index < len(row) else None, where, f": {column!r}")
        if text is not None:
            yield TextChunk(text, True, where, position)


def csv_records(lines: Lines, file: Path, delimiter: str, limit: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row below the header as a dictionary, and where it stands."""
    header = None
    for where, row, _ in _csv_lines(lines, file, delimiter, limit):
        if header is None:
            header = row
            if len({*row}) < len(row):
                raise InputFileError(f"{where}: two columns of the header have the same name: {short_repr(row)}")
        else:
            yield where, dict(zip(header, row, strict=False))


def _csv_lines(lines: Lines, file: Path, delimiter: str, limit: int) -> Iterator[tuple[str, list[str], float]]:
    """The fields of the header and of each row, where they stand, and the fraction of the file that is read."""
    csv.field_size_limit(limit)
    position, line_number, header = 0.0, 1, None

    def texts() -> Iterator[str]:
        nonlocal position
        for line, position in lines:  # noqa: B007
            yield line

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            where, line_number = f"{file}: line {line_number}", reader.line_num + 1
            if not row:  # a blank line
                continue
            header = row if header is None else header
            if len(row) > len(header):
                raise InputFileError(f"{where} has {len(row)} fields, the header {len(header)}")
            yield where, row, position
    except csv.Error as error:
        raise InputFileError(f"{file}: the row that begins in line {line_number}: {one_line(error)}") from error


# --------------------------------------------------------------------------------------------------- JSON values


def json_documents(pieces: Lines, file: Path, column: str, bad_text: BadTextHandler, limit: int) -> Iterator[TextChunk]:
    """The text of each element (object or string) of an array, or of each of several concatenated objects."""
    for number, (content, position, in_array) in enumerate(json_values(pieces, file, limit), 1):
        where = f"{file}: {'element' if in_array else 'object'} {number}"
        value = parse_json(content, where, finite=False)
        text = value if in_array and isinstance(value, str) else text_of(value, column, where, bad_text)
        if (text := bad_text.clean(text, where, f": {column!r}")) is not None:
            yield TextChunk(text, True, where, position)


def text_of(value: Any, column: str, where: str, bad_text: BadTextHandler) -> str | None:
    """The text of a JSON object, or None for null; raises `InputFileError` for another type or value.

    Unless the policy is "stop", an object without the field counts as null, as in Hugging Face's datasets.
    """
    if isinstance(value, dict) and column not in value and bad_text.policy != "stop":
        return None
    if isinstance(value, dict) and column in value and type(value[column]) in (str, type(None)):
        return value[column]
    reason = ""
    if isinstance(value, dict) and column in value:
        reason = f": it is {short_repr(value[column])}"
    elif isinstance(value, dict):
        reason = f": it {_missing_column(column, list(value))}"
    raise InputFileError(f"{where} is not a JSON object whose {column!r} is a string{reason}")


class _Buffer:
    """The text that is read but not parsed yet: `text[index:]`."""

    def __init__(self, pieces: Lines, limit: int):
        self._pieces, self._limit = pieces, limit
        self.text, self.index, self.position, self.ended = "", 0, 0.0, False

    def extend(self) -> None:
        """Reads until four times as much text is unparsed: parsing is retried rarely, not for each piece of a value."""
        texts = [self.text[self.index :]]
        wanted = min(4 * len(texts[0]), self._limit) + 1
        while sum(map(len, texts)) < wanted and not self.ended:
            piece, self.position = next(self._pieces, (None, 1.0))
            self.ended = piece is None
            texts.append(piece or "")
        self.text, self.index = "".join(texts), 0

    def peek(self) -> str:
        """The next character that is not white space, which becomes `text[index]`; "" at the end."""
        while True:
            window = self.text[self.index : self.index + 64].lstrip(" \t\r\n")
            if window:
                self.index = self.text.index(window[0], self.index)
                return window[0]
            if self.index + 64 < len(self.text):
                self.index += 64
                continue
            self.index = len(self.text)
            if self.ended:
                return ""
            self.extend()


def json_values(pieces: Lines, file: Path, limit: int) -> Iterator[tuple[str, float, bool]]:
    """The JSON of each value, the fraction of the file that is read, and whether the value is in an array."""
    buffer, decoder = _Buffer(pieces, limit), json.JSONDecoder()
    if in_array := buffer.peek() == "[":
        buffer.index += 1
    for number in itertools.count(1):
        if not (first := buffer.peek()) or (in_array and number == 1 and first == "]"):
            break
        while True:
            try:
                _, end = decoder.raw_decode(buffer.text, buffer.index)
                break
            except (ValueError, RecursionError) as error:
                where = f"{file}: {'element' if in_array else 'object'} {number}"
                if buffer.ended or isinstance(error, RecursionError):
                    parse_json(buffer.text[buffer.index :], where)  # raises an error with the line
                    raise InputFileError(f"{where}: not readable as JSON: {one_line(error)}") from error
                if len(buffer.text) - buffer.index > limit:
                    raise InputFileError(f"{where} is longer than {limit:,} characters, so this is not text") from error
                buffer.extend()
        yield buffer.text[buffer.index : end], buffer.position, in_array
        buffer.index = end
        if in_array:
            if buffer.peek() == "]":
                break
            if buffer.peek() != ",":
                raise InputFileError(f"{file}: no , or ] after element {number} of its array")
            buffer.index += 1
    if in_array:
        if buffer.peek() != "]":
            raise InputFileError(f"{file}: ends before the ] of its array")
        buffer.index += 1
    if buffer.peek():
        raise InputFileError(f"{file}: has more content after its array")


# -------------------------------------------------------------------------------------------- Parquet and Arrow


@contextlib.contextmanager
def _arrow_errors(file: Path, kind: str) -> Iterator[None]:
    """Turns what pyarrow raises into one `InputFileError`; a string that is not UTF-8 is a ValueError."""
    arrow = import_optional("pyarrow", file, extra="data")
    try:
        yield
    except InputFileError:
        raise
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise InputFileError(f"{file}: not a readable {kind} file: {one_line(error)}") from error


def open_parquet(file: Path) -> Any:
    """A Parquet file that is read a page at a time; raises `InputFileError` if it is not one."""
    reader = import_optional("pyarrow.parquet", file, extra="data")
    with _arrow_errors(file, "Parquet"):
        return reader.ParquetFile(file, memory_map=False, buffer_size=1 << 20, pre_buffer=False)


def text_column_index(parquet: Any, file: Path, column: str) -> int:
    """The index of the text column among Parquet's leaf columns; raises `InputFileError` listing the columns."""
    _check_column(parquet.schema_arrow, file, column)
    leaves = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
    return leaves.index(column)


def _check_column(schema: Any, file: Path, column: str) -> None:
    """Raises `InputFileError` when a schema has no such column of strings, plain or dictionary-encoded."""
    if schema.names.count(column) != 1:
        raise InputFileError(f"{file}: {_missing_column(column, schema.names)}")
    dtype = schema.field(column).type
    if str(dtype) in STRINGS or (str(dtype).startswith("dict") and str(dtype.value_type) in STRINGS):
        return
    raise InputFileError(f"{file}: column {column!r} is of type {dtype}, not a string")


def _parquet_batches(parquet: Any, file: Path, groups: Iterable[int], column: str | None, limit: int) -> Iterator[Any]:
    """The record batches of row groups, of one column or of all (None), small enough for 64 texts of `limit` bytes.

    A batch holds a value of a dictionary once for each row, and no value is larger than its row group: the footer's
    sizes bound both. Raises `InputFileError` for a group in which some value must exceed `limit`.
    """
    index = None if column is None else text_column_index(parquet, file, column)
    sizes = column_sizes(file, parquet.metadata.num_row_groups, parquet.metadata.num_columns)
    for group in groups:
        num_rows = parquet.metadata.row_group(group).num_rows
        chunks = sizes[group] if index is None else [sizes[group][index]]
        size, stored = (sum(chunk[i] for chunk in chunks) for i in (0, 1))
        if size > 2 * max(1, num_rows * len(chunks)) * limit + PAGE_OVERHEAD or (
            size > 64 * limit and size > EXPANSION * stored
        ):
            raise InputFileError(
                f"{file}: row group {group + 1} has {size:,} bytes in {num_rows:,} rows, compressed to "
                f"{stored:,}, so this is not text"
            )
        rows = max(1, min(64, 64 * limit // max(1, size)))
        columns = None if column is None else [column]
        yield from parquet.iter_batches(batch_size=rows, row_groups=[group], columns=columns, use_threads=False)


def parquet_rows(file_slice: FileSlice, column: str, bad_text: BadTextHandler, limit: int) -> Iterator[TextChunk]:
    """The text of each row of a range of row groups; a text has at most `limit` characters."""
    parquet, file = open_parquet(file_slice.file), file_slice.file
    counts = [parquet.metadata.row_group(i).num_rows for i in range(file_slice.stop)]
    first, rows = sum(counts[: file_slice.start]), max(1, sum(counts[file_slice.start :]))
    groups = list(range(file_slice.start, file_slice.stop))
    with _arrow_errors(file, "Parquet"):
        columns = (batch.column(0) for batch in _parquet_batches(parquet, file, groups, column, limit))
        for number, text in enumerate(_texts(columns, file, column, bad_text, first, limit), 1):
            if text is not None:
                yield TextChunk(text, True, f"{file}: row {first + number}", number / rows)


def parquet_records(file: Path, limit: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a Parquet file as a dictionary, and where it stands."""
    parquet = open_parquet(file)
    with _arrow_errors(file, "Parquet"):
        batches = _parquet_batches(parquet, file, range(parquet.metadata.num_row_groups), None, limit)
        yield from _numbered(file, (row for batch in batches for row in batch.to_pylist()))


def arrow_rows(file: Path, column: str, bad_text: BadTextHandler, limit: int) -> Iterator[TextChunk]:
    """The text of each row of an Arrow file or stream, which `datasets.Dataset.save_to_disk` writes."""
    with _open_arrow(file) as (reader, source, batches):
        _check_column(reader.schema, file, column)
        columns = (batch.column(0) for batch in _checked_batches(reader, batches, [column]))
        size = file.stat().st_size
        for number, text in enumerate(_texts(columns, file, column, bad_text, 0, limit), 1):
            if text is not None:
                position = source.tell() / size if isinstance(batches, itertools.repeat) else 1.0
                yield TextChunk(text, True, f"{file}: row {number}", position)


def arrow_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of an Arrow file or stream as a dictionary, and where it stands."""
    with _open_arrow(file) as (reader, _, batches):
        checked = _checked_batches(reader, batches, reader.schema.names)
        yield from _numbered(file, (row for batch in checked for row in batch.to_pylist()))


@contextlib.contextmanager
def _open_arrow(file: Path) -> Iterator[tuple[Any, Any, Any]]:
    """A reader of an Arrow file or stream, the bytes under it, and the indices of its record batches (None: the next).

    Raises `InputFileError` for what is neither.
    """
    arrow = import_optional("pyarrow", file, extra="data")
    ipc = import_optional("pyarrow.ipc", file, extra="data")
    # With a memory map, a wrong length in the file allocates no memory.
    with _arrow_errors(file, "Arrow"), arrow.memory_map(str(file)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = (ipc.open_file if is_file else ipc.open_stream)(source)
        yield reader, source, range(reader.num_record_batches) if is_file else itertools.repeat(None)


def _numbered(file: Path, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(rows, 1):
        yield f"{file}: row {number}", row


def _checked_batches(reader: Any, batches: Any, columns: list[str]) -> Iterator[Any]:
    """These columns of each record batch (by index; None: the next of a stream), after checking their offsets.

    pyarrow itself reads wherever they point.
    """
    for index in batches:
        try:
            batch = reader.read_next_batch() if index is None else reader.get_batch(index)
        except StopIteration:
            return
        chosen = batch.select(columns)
        chosen.validate(full=True)
        yield chosen


def _texts(
    columns: Iterator[Any], file: Path, column: str, bad_text: BadTextHandler, first: int, limit: int
) -> Iterator[str | None]:
    """The text of each row, None for a skipped one; `first`: the rows of the file before them."""
    row = first
    for values in columns:
        for value in values:
            row += 1
            where = f"{file}: row {row}"
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                if bad_text.policy == "stop":
                    raise bad_text.error(f"{where}: {column!r} is not UTF-8") from error
                content = getattr(value, "value", value).as_buffer().to_pybytes()
                text = bad_text.decode(content, file, 0)
            if text is not None and len(text) > limit:
                raise InputFileError(f"{where} is longer than {limit:,} characters, so this is not text")
            yield bad_text.clean(text, where, f": {column!r}")
