"""Compressed files: how to recognise and read them. Data after the last compressed stream is an error."""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from smollm_jax.errors import InputFileError
from smollm_jax.runtime.files import import_optional, one_line

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz", ".bz2": "bzip2"}
MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or a skippable frame
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "bzip2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
}
XZ_MEMORY = 256 << 20  # bytes; a file demands memory of its reader: 65 MiB if written by `xz -9`


def detect_compression(head: bytes) -> str | None:
    """The compression of a file with these first bytes, or None."""
    return next((name for name, magic in MAGIC.items() if magic.match(head)), None)


@contextmanager
def open_decompressed(file: Path, compression: str | None) -> Iterator[tuple[io.BufferedReader, BinaryIO]]:
    """A stream of the decompressed bytes, and the underlying file, whose position tells how much of it is read."""
    try:
        with file.open("rb") as raw:
            if compression == "gzip":
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20), raw  # pyright: ignore[reportArgumentType]
            elif compression == "zstd":
                arrow = import_optional("pyarrow", file, extra="data")
                yield io.BufferedReader(arrow.CompressedInputStream(raw, "zstd"), 1 << 20), raw
            elif compression:
                yield io.BufferedReader(_Streams(raw, DECOMPRESSORS[compression]), 1 << 20), raw
            else:
                yield raw, raw
    except (OSError, EOFError, zlib.error, lzma.LZMAError, MemoryError) as error:
        action = "decompressed" if compression else "read"
        raise InputFileError(f"{file}: cannot be {action}: {one_line(error)}") from error


DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "xz": lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY),
    "bzip2": bz2.BZ2Decompressor,
}


class _Streams(io.RawIOBase):
    """The decompressed bytes of one or more concatenated streams.

    `bz2.open` and `lzma.open` silently ignore data after the last stream; here it is an error.
    """

    def __init__(self, raw: BinaryIO, decompressor: Callable[[], Any]):
        self._raw, self._new_decompressor, self._decompressor = raw, decompressor, None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads up to `len(buffer)` bytes into a buffer; returns their number, 0 at the end of the file."""
        while True:
            content = b""
            if self._decompressor is None or self._decompressor.eof:
                content = (self._decompressor.unused_data if self._decompressor else b"") or self._raw.read(1 << 16)
                if self._decompressor and self._new_decompressor is DECOMPRESSORS["xz"]:
                    # xz allows NUL padding between streams
                    while content and not (content := content.lstrip(b"\0")):
                        content = self._raw.read(1 << 16)
                if not content:
                    return 0
                self._decompressor = self._new_decompressor()
            elif self._decompressor.needs_input and not (content := self._raw.read(1 << 16)):
                raise EOFError("the file ends before its end-of-stream marker")
            if output := self._decompressor.decompress(content, len(buffer)):
                buffer[: len(output)] = output
                return len(output)
