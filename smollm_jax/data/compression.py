"""Files that are compressed as a whole: how, and their bytes. What follows the last stream and is none is an error."""

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

PACKINGS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz", ".bz2": "bzip2"}
PACKING_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or one that is skipped
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "bzip2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
}
XZ_MEMORY = 256 << 20  # bytes; a file says how much its reader needs, `xz -9` 65 MiB


def packing_of(head: bytes) -> str | None:
    """How a file that begins so is compressed, or None."""
    return next((name for name, magic in PACKING_MAGIC.items() if magic.match(head)), None)


@contextmanager
def opened(file: Path, packing: str | None) -> Iterator[tuple[io.BufferedReader, BinaryIO]]:
    """A file's bytes, uncompressed, and the file as it lies on the disk."""
    try:
        with file.open("rb") as raw:
            if packing == "gzip":
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20), raw  # pyright: ignore[reportArgumentType]
            elif packing == "zstd":
                arrow = import_optional("pyarrow", file, extra="data")
                yield io.BufferedReader(arrow.CompressedInputStream(raw, "zstd"), 1 << 20), raw
            elif packing:
                yield io.BufferedReader(_Streams(raw, DECOMPRESSORS[packing]), 1 << 20), raw
            else:
                yield raw, raw
    except (OSError, EOFError, zlib.error, lzma.LZMAError, MemoryError) as error:
        doing = "decompressed" if packing else "read"
        raise InputFileError(f"{file}: cannot be {doing}: {one_line(error)}") from error


DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "xz": lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY),
    "bzip2": bz2.BZ2Decompressor,
}


class _Streams(io.RawIOBase):
    """The bytes of compressed streams that follow one another.

    `bz2.open` and `lzma.open` leave out without a word what follows the last stream and is none.
    """

    def __init__(self, raw: BinaryIO, decompressor: Callable[[], Any]):
        self._raw, self._make, self._decompressor = raw, decompressor, None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills what it can of a buffer; 0 at the end of the file."""
        while True:
            content = b""
            if self._decompressor is None or self._decompressor.eof:
                content = (self._decompressor.unused_data if self._decompressor else b"") or self._raw.read(1 << 16)
                if self._decompressor and self._make is DECOMPRESSORS["xz"]:  # which may be padded
                    while content and not (content := content.lstrip(b"\0")):
                        content = self._raw.read(1 << 16)
                if not content:
                    return 0
                self._decompressor = self._make()
            elif self._decompressor.needs_input and not (content := self._raw.read(1 << 16)):
                raise EOFError("the file ends before its end-of-stream marker")
            if output := self._decompressor.decompress(content, len(buffer)):
                buffer[: len(output)] = output
                return len(output)
