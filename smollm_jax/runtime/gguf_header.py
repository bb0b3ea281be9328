"""The header of a GGUF file, read with bounds: every count and length is checked against the file before use.

The `gguf` package's own reader loops without end on an array that claims 2**60 entries. Standard library only.
Source: ggml, docs/gguf.md; the order and padding of tensors as in ggml/src/gguf.cpp.
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

from smollm_jax.errors import InputFileError, short_repr
from smollm_jax.runtime.files import file_size

# Bytes before the tensor data. SmolLM2's header has 1.7 MB; one with a vocabulary of 128,256 and 280,147 merges 7.5 MB,
# one with a vocabulary of 262,144 and twice as many merges 15 MB.
MAX_HEADER = 32 << 20
MAX_FIELDS = 4096
MAX_TENSORS = 1 << 16
MAX_ARRAY = 1 << 20  # entries: the largest vocabulary that `Config` allows
MAX_STRINGS = 1 << 20  # in all arrays: the largest header above has 786,432; reading these takes a second
MAX_NAME = 256

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor's place in the file: `kind` is the ggml type number, `shape` has the fastest dimension last."""

    name: str
    kind: int
    shape: tuple[int, ...]
    row_bytes: int
    start: int  # of its data, in bytes from the start of the file
    bytes: int


def read_header(path: Path, blocks: dict[Any, tuple[int, int]]) -> tuple[dict[str, Any], list[TensorInfo]]:
    """Metadata by key, and the tensors; raises `InputFileError` naming the malformed key or tensor.

    `blocks` maps a ggml type number to the values and the bytes of a block, as `gguf.GGML_QUANT_SIZES` does.
    """
    size = file_size(path)
    if not size:
        raise InputFileError(f"{path}: is empty")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(path, data, size).read(blocks)
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read: {error}") from error


class _Header:
    def __init__(self, path: Path, data: mmap.mmap, size: int):
        self.path, self.data, self.size = path, data, size
        self.offset = self.strings = 0

    def error(self, reason: str) -> InputFileError:
        return InputFileError(f"{self.path}: not a readable GGUF file: {reason}")

    def take(self, length: int, what: str) -> int:
        """Advances by `length` bytes and returns the offset of the first of them."""
        if length > self.size - self.offset:
            raise self.error(f"{what} claims {length:,} bytes, but only {self.size - self.offset:,} follow")
        if self.offset + length > MAX_HEADER:
            raise self.error(f"{what} lies beyond the first {MAX_HEADER:,} bytes")
        self.offset += length
        return self.offset - length

    def number(self, form: str, what: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.take(struct.calcsize(f"<{form}"), what))
        return value

    def count(self, most: int, what: str) -> int:
        value = self.number("Q", what)
        if value > most:
            raise self.error(f"{what} claims {value:,} entries, at most {most:,} are read")
        return value

    def string(self, what: str, most: int = MAX_HEADER) -> str:
        length = self.number("Q", what)
        if length > most:
            raise self.error(f"{what} claims {length:,} bytes, at most {most:,} are read")
        start = self.take(length, what)
        try:
            return self.data[start : self.offset].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8") from error

    def name(self, what: str) -> str:
        name = self.string(what, MAX_NAME)
        if not name or not name.isprintable():
            raise self.error(f"{what} is {short_repr(name)}, not a printable name")
        return name

    def value(self, kind: int, what: str) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind == STRING:
            return self.string(what)
        if kind != ARRAY:
            raise self.error(f"{what} has the unknown type {kind}")
        kind, length = self.number("I", what), self.count(MAX_ARRAY, what)
        if kind in SCALARS:
            form = f"<{length}{SCALARS[kind]}"
            return list(struct.unpack_from(form, self.data, self.take(struct.calcsize(form), what)))
        if kind != STRING:
            raise self.error(f"{what} is an array of {'arrays' if kind == ARRAY else f'the unknown type {kind}'}")
        self.strings += length
        if self.strings > MAX_STRINGS:
            raise self.error(f"{what} makes {self.strings:,} strings in all, at most {MAX_STRINGS:,} are read")
        return [self.string(what) for _ in range(length)]

    def read(self, blocks: dict[Any, tuple[int, int]]) -> tuple[dict[str, Any], list[TensorInfo]]:
        if self.data[:4] != b"GGUF":
            raise self.error(f"begins with {short_repr(self.data[:4])}, not GGUF")
        self.offset = 4
        version = self.number("I", "the version")
        if version not in (2, 3):
            raise self.error(f"version {version}, but only little-endian versions 2 and 3 are read")
        tensors = self.count(MAX_TENSORS, "the tensor count")
        fields: dict[str, Any] = {}
        for index in range(self.count(MAX_FIELDS, "the metadata count")):
            key = self.name(f"metadata key {index}")
            if key in fields:
                raise self.error(f"metadata key {key} occurs twice")
            fields[key] = self.value(self.number("I", f"metadata {key}"), f"metadata {key}")
        infos = [self.tensor_info(index, blocks) for index in range(tensors)]
        return fields, self.located(infos, fields.get("general.alignment", 32))

    def tensor_info(self, index: int, blocks: dict[Any, tuple[int, int]]) -> TensorInfo:
        """The next tensor entry; its `start` counts from the beginning of the tensor data."""
        name = self.name(f"the name of tensor {index}")
        rank = self.number("I", f"tensor {name}")
        if not 1 <= rank <= 4:
            raise self.error(f"tensor {name} has {rank:,} dimensions, 1 to 4 are read")
        shape = tuple(self.number("Q", f"tensor {name}") for _ in range(rank))[::-1]
        kind, start = self.number("I", f"tensor {name}"), self.number("Q", f"tensor {name}")
        if kind not in blocks:
            raise self.error(f"tensor {name} has the unknown quantisation {kind}")
        values, size = blocks[kind]
        if not all(shape) or shape[-1] % values:
            raise self.error(f"tensor {name} has shape {list(shape)}, but its rows are stored in blocks of {values}")
        row_bytes = shape[-1] // values * size
        return TensorInfo(name, kind, shape, row_bytes, start, math.prod(shape[:-1]) * row_bytes)

    def located(self, infos: list[TensorInfo], alignment: Any) -> list[TensorInfo]:
        """The tensors with `start` counted from the start of the file; they must be contiguous, up to padding."""
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self.error(f"general.alignment must be a power of two, got {short_repr(alignment)}")
        first = -(-self.offset // alignment) * alignment
        expected, end, names = first, first, set()
        for info in infos:
            if info.name in names:
                raise self.error(f"tensor {info.name} occurs twice")
            names.add(info.name)
            if first + info.start != expected:
                raise self.error(f"tensor {info.name} begins at byte {info.start:,}, expected {expected - first:,}")
            end = expected + info.bytes
            if end > self.size:
                raise self.error(f"tensor {info.name} ends at byte {end:,} of a file of {self.size:,}")
            expected = -(-end // alignment) * alignment
        if infos and self.size > expected:
            raise self.error(f"{self.size - expected:,} bytes follow the last tensor")
        return [dataclasses.replace(info, start=first + info.start) for info in infos]
