"""Malformed compressed texts, Parquet files and data sets."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tests.hostile_texts import GOOD, MIB, Writer, text, tokens
from tests.hostile_weights import Cases

Change = Callable[[dict[str, Any]], dict[str, Any]]
LINE = b'{"text": "some text"}\n'


def zst(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


def flipped(content: bytes, offset: int) -> bytes:
    return content[:offset] + bytes([content[offset] ^ 255]) + content[offset + 1 :]


def bomb(name: str, pack: Callable[[bytes], bytes], content: bytes) -> Writer:
    """A small compressed file that repeats the content 60 times, in 60 members; created on demand."""
    return text(name, lambda folder: (folder / name, (folder / name).write_bytes(pack(content) * 60))[0])


def packed(kind: str, pack: Callable[[bytes], bytes]) -> Cases:
    """The cases that both compression formats share."""
    name, content, no = f"x.{kind}", pack(LINE * 999), f"x.{kind}: cannot be decompressed: "
    return {
        f"{kind}, truncated": (text(name, content[:-9]), f"{no}.*(end-of-stream|Truncated)"),
        f"{kind}, cut in half": (text(name, content[: len(content) // 2]), no),
        f"{kind}, text": (text(name, LINE), no),
        f"{kind}, followed by text": (text(name, content + LINE), no),
        f"{kind}, of nothing": (text(name, pack(b"")), "holds no text"),
        f"{kind}, empty": (text(name, b""), "holds no text"),
        f"{kind}, UTF-16": (text(name, pack(LINE.decode().encode("utf-16-le"))), "looks like UTF-16"),
        f"{kind}, not UTF-8": (text(name, pack(LINE + b'{"text": "\xe9"}')), "byte 32 is not UTF-8"),
        f"{kind}, NUL": (text(name, pack(LINE + b"\0")), "line 2: character 0 is NUL"),
        f"{kind}, 60 MB in a line": (bomb(name, pack, b" " * MIB), "line 1 is longer than 16,777,216"),
        f"{kind}, 60 MB of blanks": (bomb(name, pack, (b" " * 1023 + b"\n") * 1024), "holds no text"),
    }


def greedy() -> bytes:
    """A few bytes of xz that make its reader allocate 1.5 GB."""
    return lzma.compress(LINE, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 3 << 29, "mode": lzma.MODE_FAST}])


def parquet(table: Any, spoil: Callable[[bytes], bytes] = bytes) -> Writer:
    def write(folder: Path) -> Path:
        pyarrow.parquet.write_table(table, folder / "x.parquet", compression="none", use_dictionary=False)
        (folder / "x.parquet").write_bytes(spoil((folder / "x.parquet").read_bytes()))
        return folder / "x.parquet"

    return text("x.parquet", write)


def strings(*values: bytes) -> Any:
    """A string column with these bytes, valid UTF-8 or not."""
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), pyarrow.array(values, pyarrow.binary()).buffers())


TABLE = pyarrow.table({"text": [f"text number {i}" for i in range(500)], "n": range(500)})
NOT = r"x\.parquet: not a readable Parquet file"
COMPRESSED: Cases = packed("jsonl.gz", gzip.compress) | packed("jsonl.zst", zst)
COMPRESSED |= packed("jsonl.xz", lzma.compress) | packed("jsonl.bz2", bz2.compress)
COMPRESSED |= {
    "jsonl.gz, a flipped byte": (text("x.jsonl.gz", flipped(gzip.compress(LINE * 99), 20)), "cannot be decompressed"),
    "gz in gz": (text("x.jsonl.gz", gzip.compress(gzip.compress(LINE))), "is compressed twice: decompress it once"),
    "a tar in gz": (text("x.tgz", gzip.compress(bytes(257) + b"ustar\0" + bytes(300))), "looks like a tar archive"),
    "JSON lines in .txt.gz": (text("x.txt.gz", gzip.compress(LINE)), "holds JSON lines, not plain text"),
    "Parquet in gz": (text("x.parquet.gz", gzip.compress(b"PAR1" + LINE)), "Parquet in gzip: decompress it first"),
    "xz that wants 4 GB": (text("x.txt.xz", greedy()), "cannot be decompressed: Memory usage limit exceeded"),
    "jsonl.gz, another checksum": (text("x.jsonl.gz", flipped(gzip.compress(LINE * 99), -7)), "CRC"),
}
PARQUET: Cases = {
    "empty": (text("x.parquet", b""), NOT),
    "text": (text("x.parquet", LINE * 99), NOT),
    "cut at its end": (parquet(TABLE, lambda x: x[:-9]), NOT),
    "a footer of 4 GB": (parquet(TABLE, lambda x: x[:-8] + b"\xff" * 4 + b"PAR1"), NOT),
    "a footer of nothing": (parquet(TABLE, lambda x: x[:-8] + bytes(4) + b"PAR1"), NOT),
    "a footer of noise": (parquet(TABLE, lambda x: x[:-300] + bytes(range(256)) + x[-44:]), NOT),
    "pages of noise": (parquet(TABLE, lambda x: x[:4] + bytes(255 - i for i in range(256)) + x[260:]), NOT),
    "no such column": (
        parquet(TABLE.drop_columns("text")),
        "has no column 'text', only .*'n'.*: choose one with",
    ),
    "a column twice": (parquet(TABLE.append_column("text", TABLE["n"])), "has no column 'text', only"),
    "numbers": (parquet(pyarrow.table({"text": [1, 2]})), "column 'text' is of type int64, not a string"),
    "bytes": (parquet(pyarrow.table({"text": [b"a"]})), "column 'text' is of type binary, not a string"),
    "lists": (parquet(pyarrow.table({"text": [["a"]]})), "column 'text' is of type list.*, not a string"),
    "a null": (parquet(pyarrow.table({"text": ["a", None]})), "row 2: 'text' is null"),
    "NUL": (parquet(pyarrow.table({"text": ["a", "b\0"]})), "row 2: 'text': character 1 is NUL"),
    "not UTF-8": (parquet(pyarrow.table({"text": strings(b"a", b"caf\xe9")})), "row 2: 'text' is not UTF-8"),
    "no rows": (parquet(TABLE.slice(0, 0)), "holds no text"),
    "a dictionary of numbers": (
        parquet(pyarrow.table({"text": pyarrow.array([1, 2]).dictionary_encode()})),
        "column 'text' is of type (int64|dictionary.*), not a string",
    ),
    "records": (parquet(pyarrow.table({"text": [{"a": "b"}]})), "column 'text' is of type struct.*, not a string"),
}


def arrow(table: Any, spoil: Callable[[bytes], bytes] = bytes, stream: bool = True) -> Writer:
    sink = pyarrow.BufferOutputStream()
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return text("x.arrow", spoil(sink.getvalue().to_pybytes()))


NO_ARROW = r"x\.arrow: not a readable Arrow file"
OFFSETS = pyarrow.array(["some", "text"]).buffers()[1].to_pybytes()
ARROW: Cases = {
    "empty": (text("x.arrow", b""), "holds no text"),
    "text": (text("x.arrow", LINE * 99), NO_ARROW),
    "cut in half": (arrow(TABLE, lambda x: x[: len(x) // 2]), NO_ARROW),
    "a file cut in half": (arrow(TABLE, lambda x: x[: len(x) // 2], stream=False), NO_ARROW),
    "metadata of 2 GB": (arrow(TABLE, lambda x: x[:4] + b"\xff\xff\xff\x7f" + x[8:]), NO_ARROW),
    "offsets far beyond the text": (
        arrow(
            pyarrow.table({"text": ["some", "text"]}),
            lambda x: x.replace(OFFSETS, b"\0\0\0\0" + b"\xff\xff\xff\x7f" * 2),
        ),
        NO_ARROW,
    ),
    "not UTF-8": (arrow(pyarrow.table({"text": strings(b"a", b"caf\xe9")})), NO_ARROW),
    "a null": (arrow(pyarrow.table({"text": ["a", None]})), "row 2: 'text' is null"),
    "no such column": (arrow(TABLE.drop_columns("text"), stream=False), "has no column 'text', only"),
}


def manifest(files: object) -> Writer:
    """A set of one token file, with these `files` in its manifest, or what a function makes of the correct entry."""

    def write(folder: Path) -> Path:
        lone = tokens(GOOD)(folder).rename(folder / "y")
        (folder / "x").mkdir()
        metadata = json.loads((lone.rename(folder / "x/000000-0000") / "tokens.json").read_text())
        entry = {"name": "000000-0000"} | {name: metadata[name] for name in ("tokens", "documents", "sha256")}
        content = {"format": "smollm-tokens-2", "files": files(entry)} if callable(files) else files
        (folder / "x/manifest.json").write_text("{" if content is None else json.dumps(content))
        return folder / "x"

    return write


ANOTHER = r"000000-0000/tokens\.bin: differs from its entry in .*manifest\.json"
SETS: Cases = {
    "no JSON": (manifest(None), "manifest.json: not readable as JSON"),
    "a list": (manifest([]), "manifest.json: is not the manifest of a data set"),
    "of the older format": (manifest({"format": "smollm-tokens-1"}), "manifest.json: has an older format"),
    "no files": (manifest({"format": "smollm-tokens-2"}), "manifest.json: lacks files"),
    "files that are none": (manifest(lambda entry: "a"), "files must be a list, got 'a'"),
    "an empty list": (manifest(lambda entry: []), "files must list at least one token file"),
    "a file that is a number": (manifest(lambda entry: [7]), "files: 7 does not name a folder"),
    "a name in another folder": (
        manifest(lambda entry: [entry | {"name": "../tokenizer"}]),
        "not name a folder next to",
    ),
    "the folder itself": (manifest(lambda entry: [entry | {"name": "."}]), "not name a folder next to"),
    "a missing file": (manifest(lambda entry: [entry, entry | {"name": "1-1"}]), r"1-1/tokens\.json: no such file"),
    "another file": (manifest(lambda entry: [entry | {"sha256": "ab" * 32}]), ANOTHER),
    "a key more than was signed": (
        manifest({"format": "smollm-tokens-2", "files": [], "more": 1, "manifest_sha256": "0" * 64}),
        "manifest_sha256 differs",
    ),
    "another count": (manifest(lambda entry: [entry | {"tokens": 5}]), ANOTHER),
}
