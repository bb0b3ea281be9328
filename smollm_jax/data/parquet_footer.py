"""The sizes of column chunks, read from the footer of a Parquet file. Standard library only.

pyarrow 26 ends the process where a chunk's metadata are malformed: its `RowGroupMetaData.column` lets a C++ exception
through. Source: apache/parquet-format, parquet.thrift; apache/thrift, doc/specs/thrift-compact-protocol.md.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from smollm_jax.errors import InputFileError

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
MAX_DEPTH = 32  # structs and lists in each other; those of Parquet need 8
# Field numbers: of FileMetaData, RowGroup, ColumnChunk and ColumnMetaData.
ROW_GROUPS, COLUMNS, METADATA, UNCOMPRESSED, COMPRESSED = 4, 1, 3, 6, 7


def column_sizes(file: Path, row_groups: int, columns: int) -> list[list[tuple[int, int]]]:
    """The bytes of each column chunk of each row group: uncompressed, and as stored.

    Raises `InputFileError` if the footer is malformed, lacks a size, or has other numbers of row groups or columns.
    """
    try:
        with file.open("rb") as stream:
            footer = _Compact(_footer_of(stream))
        groups: list[list[tuple[int, int]]] = []
        for field, kind in footer.fields():
            if (field, kind) != (ROW_GROUPS, LIST):
                footer.skip(kind)
                continue
            groups = [_chunks(footer) for _ in range(footer.size_of_list(STRUCT))]
        if [len(group) for group in groups] != [columns] * row_groups:
            raise ValueError("another number of columns")
        return groups
    except (OSError, IndexError, ValueError, KeyError, RecursionError) as error:
        raise InputFileError(f"{file}: not a readable Parquet file: its footer is malformed") from error


def _footer_of(stream: BinaryIO) -> bytes:
    size = stream.seek(-8, os.SEEK_END) + 8
    length = int.from_bytes(stream.read(4), "little")
    if stream.read(4) != b"PAR1" or length > size - 12:
        raise ValueError("no footer")
    stream.seek(size - 8 - length)
    return stream.read(length)


def _chunks(footer: "_Compact") -> list[tuple[int, int]]:
    """The sizes of the column chunks of the row group that begins here."""
    chunks = []
    for field, kind in footer.fields():
        if (field, kind) != (COLUMNS, LIST):
            footer.skip(kind)
            continue
        for _ in range(footer.size_of_list(STRUCT)):
            sizes: dict[int, Any] = {}
            for chunk_field, chunk_kind in footer.fields():
                if (chunk_field, chunk_kind) != (METADATA, STRUCT):
                    footer.skip(chunk_kind)
                    continue
                for number, value_kind in footer.fields():
                    if number in (UNCOMPRESSED, COMPRESSED) and value_kind == I64:
                        sizes[number] = footer.integer()
                    else:
                        footer.skip(value_kind)
            chunks.append((sizes[UNCOMPRESSED], sizes[COMPRESSED]))
    return chunks


class _Compact:
    """A reader of Thrift's compact protocol; `IndexError` at the end of the data."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number has more than 64 bits")

    def integer(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)

    def size_of_list(self, expected: int | None = None) -> int:
        """The number of elements of the list that begins here; `ValueError` if they are of another type."""
        header = self.byte()
        if expected is not None and header & 0x0F != expected:
            raise ValueError("a list of another type")
        return self.varint() if header >> 4 == 15 else header >> 4

    def fields(self) -> Iterator[tuple[int, int]]:
        """The number and type of each field of the struct that begins here; the caller reads or skips its value."""
        number = 0
        while header := self.byte():
            number = number + (header >> 4) if header >> 4 else self.integer()
            yield number, header & 0x0F

    def skip(self, kind: int, depth: int = 0, *, element: bool = False) -> None:
        """Passes over a value; a bool is in its field's header, as an element of a list it has a byte."""
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        if self.at >= len(self.data):  # which a list of 2**60 booleans would pass one by one
            raise IndexError("the footer ends")
        if kind in (TRUE, FALSE):
            self.at += element
        elif kind == BYTE:
            self.at += 1
        elif kind in (I16, I32, I64):
            self.varint()
        elif kind == DOUBLE:
            self.at += 8
        elif kind == BINARY:
            length = self.varint()
            self.at += length
        elif kind in (LIST, SET):
            inner = self.data[self.at] & 0x0F
            for _ in range(self.size_of_list()):
                self.skip(inner, depth + 1, element=True)
        elif kind == MAP:
            if size := self.varint():
                kinds = self.byte()
                for _ in range(size):
                    self.skip(kinds >> 4, depth + 1, element=True)
                    self.skip(kinds & 0x0F, depth + 1, element=True)
        elif kind == STRUCT:
            for _, inner in self.fields():
                self.skip(inner, depth + 1)
        else:
            raise ValueError("an unknown type")
