"""Malformed configs, token files, texts and pickles."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smollm_jax.config.hf_config import config_to_hf
from tests.hostile_weights import Cases
from tests.small_files import SMALL, tokenizer_folder

Writer = Callable[[Path], Path]
MIB = 1 << 20


def holding(name: str, content: bytes) -> Writer:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def sparse(name: str, size: int, fill: bytes = b"") -> Writer:
    """A sparse file of `size` bytes: `fill` repeated for the first 20 MiB, then a hole."""

    def write(folder: Path) -> Path:
        with (folder / name).open("wb") as file:
            file.write(fill * (20 * MIB // len(fill)) if fill else b"")
            file.truncate(size)
        return folder / name

    return write


def endless(name: str, begin: bytes, fill: bytes) -> Writer:
    """A file that starts with `begin` and continues with 40 MiB of `fill`, repeated."""
    return lambda folder: (folder / name, (folder / name).write_bytes(begin + fill * (40 * MIB // len(fill))))[0]


# ------------------------------------------------------------------------------------------------- config.json


def config(**changed: Any) -> Writer:
    return holding("config.json", json.dumps(config_to_hf(SMALL) | changed).encode())


def config_text(old: str, new: str) -> Writer:
    text = json.dumps(config_to_hf(SMALL))
    assert text.count(old) == 1, old
    return holding("config.json", text.replace(old, new).encode())


CONFIG: Cases = {
    "empty": (holding("config.json", b""), "not readable as JSON"),
    "a list": (holding("config.json", b"[]"), "must be a JSON object, got list"),
    "a string": (holding("config.json", b'"llama"'), "must be a JSON object, got str"),
    "a byte order mark": (holding("config.json", b"\xef\xbb\xbf{}"), "begins with a byte order mark"),
    "UTF-16": (holding("config.json", json.dumps(config_to_hf(SMALL)).encode("utf-16")), "looks like UTF-16"),
    "not UTF-8": (holding("config.json", b'{"a": "\xe9"}'), "byte 7 is not UTF-8"),
    "nested too deeply": (holding("config.json", b"[" * 100_000), "nested too deeply"),
    "5 MiB": (sparse("config.json", 5 * MIB), "too large: .* bytes, at most"),
    "an unknown key": (config(sliding_window=4096), "does not support: 'sliding_window'"),
    "code": (config(auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    "a string for a number": (config(hidden_size="8"), "hidden_size must be an integer .* got '8'"),
    "a boolean for a number": (config(num_hidden_layers=True), "num_hidden_layers must be an integer .* got True"),
    "a boolean for a fraction": (config(rms_norm_eps=True), "rms_norm_eps must be a number .* got True"),
    "a fraction for a whole": (config(vocab_size=300.0), r"vocab_size must be an integer .* got 300\.0"),
    "a number for a boolean": (config(tie_word_embeddings=1), "tie_word_embeddings must be true or false, got 1"),
    "0 for false": (config(attention_bias=0), "attention_bias=0 is not supported"),
    "true for 1": (config(pretraining_tp=True), "pretraining_tp=True is not supported"),
    "null for a number": (config(hidden_size=None), "hidden_size must be an integer"),
    "NaN": (config(rms_norm_eps=float("nan")), "key 'rms_norm_eps' is NaN"),
    "infinite": (config(initializer_range=float("inf")), "key 'initializer_range' is NaN, infinite"),
    "1e999": (config_text('"initializer_range": 0.1', '"initializer_range": 1e999'), "key 'initializer_range'"),
    "NaN in a list": (config(eos_token_id=[0, float("nan")]), "key 'eos_token_id'"),
    "10,000 digits": (config_text('"hidden_size": 8', '"hidden_size": 8' + "0" * 10_000), "key 'hidden_size'"),
    "90 digits": (config(hidden_size=10**90), "hidden_size must be an integer from 1 to 65536"),
    "a key twice": (
        config_text('"hidden_size": 8', '"hidden_size": 8, "hidden_size": 8'),
        "'hidden_size' occurs twice",
    ),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers must be an integer from 1 to 1024"),
    "a huge vocabulary": (config(vocab_size=2**40), "vocab_size must be an integer from 1 to 1048576"),
    "no head": (config(num_attention_heads=0), "num_attention_heads must be an integer from 1"),
    "heads below 0": (config(num_key_value_heads=-1), "num_key_value_heads must be an integer from 1"),
    "theta of 1e300": (config(rope_theta=1e300, rope_parameters=None), "rope_theta must be a number from 1 to"),
    "theta of 1e-300": (config(rope_theta=1e-300, rope_parameters=None), "rope_theta must be a number from 1 to"),
    "theta in words": (config(rope_theta="10000"), "rope_theta must be a number"),
    "two thetas": (config(rope_theta=5.0), "must agree, got rope_theta=5.0"),
    "a scaled theta": (config(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling"),
    "eps of 1e-300": (config(rms_norm_eps=1e-300), "rms_norm_eps must be a number from 1e-30"),
    "eos in a list in a list": (config(eos_token_id=[[0]]), r"eos_token_id must be a token id .* got \[0\]"),
    "eos in words": (config(eos_token_id="</s>"), "eos_token_id must be a token id"),
    "eos below 0": (config(eos_token_id=-2), "eos_token_id must be a token id"),
    "a dtype in words": (config(torch_dtype="banana"), "torch_dtype must be one of float32.* got 'banana'"),
    "a dtype that is a number": (config(dtype=16), "dtype must be one of float32.* got 16"),
    "two dtypes": (config(dtype="float16"), "must agree, got dtype='float16'"),
    "no head_dim to be had": (
        config(head_dim=None, hidden_size=9),
        "hidden_size is not divisible by num_attention_heads",
    ),
}

# --------------------------------------------------------------------------------------- token files and texts


def tokens(content: bytes, length: int | None = None, ends: bytes | None = None, **changed: Any) -> Writer:
    """A token file with a correct sidecar except for the changed keys; None removes a key."""

    def write(folder: Path) -> Path:
        tokenizer = tokenizer_folder(folder / "tokenizer")
        (folder / "x").mkdir()
        (folder / "x/tokens.bin").write_bytes(content[:length])
        whole = (len(content) // 2).to_bytes(8, "little")
        (folder / "x/documents.bin").write_bytes(whole if ends is None else ends)
        sidecar = {
            "format": "smollm-tokens-2",
            "tokens": len(content) // 2,
            "documents": 1,
            "eos_token_id": 0,
            "largest_id": max(content[i] + 256 * content[i + 1] for i in range(0, len(content), 2)) if content else 0,
            "sha256": hashlib.sha256(content).hexdigest(),
            "documents_sha256": hashlib.sha256(whole).hexdigest(),
            "tokenizer_sha256": hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest(),
        } | changed
        sidecar = {key: value for key, value in sidecar.items() if value is not None}
        (folder / "x/tokens.json").write_text(json.dumps(sidecar))
        return folder / "x"

    return write


GOOD = bytes([5, 0, 6, 0, 3, 1, 0, 0])  # tokens 5, 6, 259, 0
TOKENS: Cases = {
    "of another format": (tokens(GOOD, format="x"), "tokens.json: is not the sidecar"),
    "of the older format": (tokens(GOOD, format="smollm-tokens-1"), "tokens.json: has an older format .* again"),
    "without its ends": (
        tokens(GOOD, ends=b""),
        r"documents\.bin: has 0 bytes, not 8 for each of the 1 documents",
    ),
    "an end flipped": (tokens(GOOD, ends=bytes(8)), r"documents\.bin: is damaged: its sha256 is"),
    "a largest id in words": (tokens(GOOD, largest_id="9"), "largest_id must be a token id, got '9'"),
    "without a count": (tokens(GOOD, tokens=None), "tokens.json: lacks tokens"),
    "a count in words": (tokens(GOOD, tokens="4"), "tokens.json: tokens must be a count, got '4'"),
    "a count that is a fraction": (tokens(GOOD, tokens=4.0), "tokens.json: tokens must be a count, got 4.0"),
    "a count that is true": (tokens(GOOD, documents=True), "tokens.json: documents must be a count, got True"),
    "a count below 0": (tokens(GOOD, documents=-1), "tokens.json: documents must be a count, got -1"),
    "an eos in words": (tokens(GOOD, eos_token_id="0"), "tokens.json: eos_token_id must be a token id, got '0'"),
    "a digest that is a number": (tokens(GOOD, sha256=7), "tokens.json: sha256 must be 64 hexadecimal digits, got 7"),
    "a digest cut": (tokens(GOOD, sha256="ab12"), "tokens.json: sha256 must be 64"),
    "an odd size": (tokens(GOOD, 7), r"tokens\.bin: has 7 bytes"),
    "shrunk": (tokens(GOOD, 6), r"tokens\.bin: has 6 bytes, not 2 for each of the 4 tokens"),
    "grown": (tokens(GOOD, tokens=3), r"tokens\.bin: has 8 bytes, not 2 for each of the 3 tokens"),
    "empty": (tokens(b""), r"tokens\.bin: has 0 bytes"),
    "flipped": (
        tokens(GOOD, sha256="ab" * 32),
        r"tokens\.bin: is damaged: its sha256 is .*, but tokens.json has abababababab",
    ),
    "an id beyond the vocabulary": (
        tokens(GOOD + b"\x04\x01"),
        r"tokens\.bin: token 4 is 260, but the largest id of the vocabulary is 259",
    ),
    "of another tokenizer": (tokens(GOOD, tokenizer_sha256="cd" * 32), "another tokenizer"),
    "of another eos": (tokens(GOOD, eos_token_id=1), "ends its documents with token 1"),
}


def text(name: str, content: bytes | Writer) -> Writer:
    def write(folder: Path) -> Path:
        tokenizer_folder(folder / "tokenizer")
        return (content if callable(content) else holding(name, content))(folder)

    return write


LONG = 100 * MIB
TEXT: Cases = {
    "empty": (text("x.txt", b""), "holds no text"),
    "a byte order mark alone": (text("x.txt", b"\xef\xbb\xbf"), "holds no text"),
    "not UTF-8 behind a byte order mark": (text("x.txt", b"\xef\xbb\xbfa\xe9\n"), "byte 4 is not UTF-8"),
    "NUL": (text("x.txt", b"one\ntwo\0three\n"), "line 2: character 3 is NUL"),
    "not UTF-8": (text("x.txt", b"one\ncaf\xe9\n"), "byte 7 is not UTF-8"),
    "a character cut at the end": (text("x.txt", "one é".encode()[:-1]), "byte 4 is not UTF-8"),
    "UTF-16 with a mark": (text("x.txt", "hello".encode("utf-16")), "looks like UTF-16"),
    "UTF-16 without a mark": (text("x.txt", "hello\nyou\n".encode("utf-16-le")), "looks like UTF-16"),
    "UTF-16, big-endian": (text("x.txt", "hello\nyou\n".encode("utf-16-be")), "looks like UTF-16"),
    "one line of 100 MB": (text("x.txt", sparse("x.txt", LONG, fill=b"a" * MIB)), "line 1 is longer than 16,777,216"),
    "a line of 100 MB behind others": (
        text("x.txt", sparse("x.txt", LONG, fill=b"a\n" * 8 + b"b" * (17 * MIB))),
        "line 9 is longer than 16,777,216",
    ),
    "100 MB of nothing": (text("x.txt", sparse("x.txt", LONG)), "line 1"),
    "JSONL, empty": (text("x.jsonl", b"\n\n"), "holds no text"),
    "JSONL, two byte order marks": (text("x.jsonl", b'\xef\xbb\xbf\xef\xbb\xbf{"text": "a"}'), "line 1: not readable"),
    "JSONL, UTF-16": (text("x.jsonl", '{"text": "a"}\n'.encode("utf-16-le")), "looks like UTF-16"),
    "JSONL, not UTF-8": (text("x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n'), "byte 24 is not UTF-8"),
    "JSONL, NUL": (text("x.jsonl", b'{"text": "a"}\n{"text": "\0"}\n'), "line 2: character 10 is NUL"),
    "JSONL, NUL by its number": (text("x.jsonl", rb'{"text": "ab\u0000"}'), "line 1: 'text': character 2 is NUL"),
    "JSONL, half a pair": (
        text("x.jsonl", rb'{"text": "a\ud800"}'),
        "line 1 cannot be encoded: character 1 is a lone surrogate",
    ),
    "JSONL, no JSON": (text("x.jsonl", b'{"text": "a"}\n{"text": \n'), "line 2: not readable as JSON"),
    "JSONL, nested too deeply": (text("x.jsonl", b"[" * 100_000), "line 1: .*nested too deeply"),
    "JSONL, a number": (text("x.jsonl", b'{"text": 3}'), "line 1 is not a JSON object whose 'text'"),
    "JSONL, a list": (text("x.jsonl", b'["a"]'), "line 1 is not a JSON object"),
    "JSONL, no text": (text("x.jsonl", b'{"txt": "a"}'), "line 1 is not a JSON object"),
    "JSONL, text twice": (text("x.jsonl", b'{"text": "a", "text": "b"}'), "line 1: key 'text' occurs twice"),
    "JSONL, one line of 100 MB": (
        text("x.jsonl", sparse("x.jsonl", LONG, fill=b" " * MIB)),
        "line 1 is longer than 16,777,216",
    ),
}

FRAMED = "looks like an HTML or XML page: extract its text"
STRANGERS: Cases = {
    "JSON lines called .txt": (
        text("x.txt", b'{"text": "a"}\n{"text": "b"}\n'),
        r"holds JSON lines.*to end in \.jsonl",
    ),
    "JSON lines called .md": (text("x.md", b'{"id": 1}\n'), "holds JSON lines"),
    "an array called .txt": (text("x.txt", b'[\n {"text": "a"},\n {"text": "b"}\n]'), "holds JSON, not plain text"),
    "strings called .txt": (text("x.txt", b'["a", "b"]'), "holds JSON, not plain text"),
    "a page called .txt": (text("x.txt", b"\n<!doctype HTML>\n<html></html>"), FRAMED),
    "a page": (text("x.html", b"<p>hello"), "is an HTML page by its name: extract its text"),
    "XML called .text": (text("x.text", b'<?xml version="1.0"?><a/>'), FRAMED),
    "a notebook": (text("x.ipynb", b'{"cells": []}'), "is a Jupyter notebook by its name"),
    "a PDF called .txt": (text("x.txt", b"%PDF-1.7\n"), "looks like a PDF: extract its text"),
    "a ZIP without a name": (text("x", b"PK\x03\x04" + bytes(30)), "looks like a ZIP archive"),
    "Feather's first version": (
        text("x.feather", b"FEA1" + bytes(99)),
        "looks like Feather's first version: convert it",
    ),
    "a tar": (text("x", bytes(257) + b"ustar\0" + bytes(300)), "looks like a tar archive: unpack it"),
    "a Git LFS pointer": (
        text("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "looks like a Git LFS pointer: fetch the file itself with `git lfs pull`",
    ),
    "a database": (text("x.db", b"SQLite format 3\0"), "looks like an SQLite database: convert it"),
    "an array of NumPy": (text("x", b"\x93NUMPY\x01\0"), "looks like a NumPy array"),
    "numbers": (text("x.bin", bytes(range(9))), r"is binary data by its name"),
    "a photo called .md": (text("x.md", b"\xff\xd8\xff\xe0" + bytes(9)), "looks like an image"),
    "AppleDouble": (text("._x.txt", b"\0\x05\x16\x07\0\x02"), "looks like macOS's AppleDouble"),
}
TABLES: Cases = {
    "no header": (
        text("x.csv", b"hello\nyou\n"),
        r"has no column 'text', only \['hello'\]: choose one with --text-column",
    ),
    "semicolons": (text("x.csv", b"n;text\n1;a\n"), "its delimiter is ';': save it with ','"),
    "a column twice": (text("x.csv", b"text,text\na,b\n"), "has no column 'text', only"),
    "a field too many": (text("x.tsv", b"text\tn\na\t1\t2\n"), "line 2 has 3 fields, the header 2"),
    "a field too few": (text("x.csv", b"n,text\n1\n"), "line 2: 'text' is null"),
    "a quote that does not end": (text("x.csv", b'text\nok\n"a\nb\n'), "the row that begins in line 3: unexpected end"),
    "text behind a quote": (text("x.csv", b'text\n"a" b\n'), "the row that begins in line 2: ',' expected"),
    "40 MB behind a quote": (
        text("x.csv", endless("x.csv", b'text\n"', b"a" * 999 + b"\n")),
        "the row that begins in line 2: field larger than field limit",
    ),
    "CSV, not UTF-8": (text("x.csv", b"text\nok\ncaf\xe9\n"), "byte 11 is not UTF-8"),
    "CSV, NUL": (text("x.csv", b"text\na\0b\n"), "line 2: 'text': character 1 is NUL"),
    "CSV, UTF-16": (text("x.csv", "text\na\n".encode("utf-16")), "looks like UTF-16"),
    "CSV, empty": (text("x.csv", b""), "holds no text"),
}
JSON: Cases = {
    "prose": (text("x.json", b"hello"), "object 1: not readable as JSON"),
    "an array of numbers": (text("x.json", b"[1, 2]"), "element 1 is not a JSON object whose 'text'"),
    "an array of arrays": (text("x.json", b'[[{"text": "a"}]]'), "element 1 is not a JSON object"),
    "an object of others": (text("x.json", b'{"version": 1, "data": []}'), r"only \['version', 'data'\]"),
    "columns": (text("x.json", b'{"text": ["a", "b"]}'), r"whose 'text' is a string: it is \['a', 'b'\]"),
    "conversations": (
        text("x.json", b'[{"messages": []}]'),
        "element 1 .* 'messages' is a conversation",
    ),
    "an array cut short": (text("x.json", b'[{"text": "a"}, {"te'), "element 2: not readable as JSON"),
    "an array without its end": (text("x.json", b'[{"text": "a"}'), r"no , or \] after element 1 of its array"),
    "a comma too many": (text("x.json", b'[{"text": "a"},]'), "element 2: not readable as JSON"),
    "more than an array": (text("x.json", b'[{"text": "a"}] [1]'), "has more content after its array"),
    "text twice": (text("x.json", b'[{"text": "a", "text": "b"}]'), "element 1: key 'text' occurs twice"),
    "null": (text("x.json", b'["a", {"text": null}]'), "element 2: 'text' is null"),
    "not UTF-8": (text("x.json", b'[{"text": "caf\xe9"}]'), "byte 14 is not UTF-8"),
    "nested too deeply": (text("x.json", b"[" * 100_000), "element 1: not readable as JSON: nested too deeply"),
    "one string of 40 MB": (
        text("x.json", endless("x.json", b'["', b"a")),
        "element 1 is longer than 16,777,216 characters",
    ),
    "one list of 40 MB": (
        text("x.json", endless("x.json", b'[{"text": "a"}, [', b'"' + b"a" * 997 + b'",')),
        "element 2 is longer than",
    ),
    "a byte that is no UTF-8 behind a byte order mark": (
        text("x.json", b'\xef\xbb\xbf["\xe9"]'),
        "byte 5 is not UTF-8",
    ),
}

# ---------------------------------------------------------------------------------------------------- pickles


class Evil:
    """Its pickle makes a folder "it ran" beside it when it is read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder / "it ran"),))


def evil(name: str) -> Writer:
    """A pickle that would run code, under any file name, in a subfolder if the name has one."""

    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps({"a": Evil(folder)}, protocol=0 if name.endswith(".json") else None))
        return path

    return write


def evil_array(name: str) -> Writer:
    def write(folder: Path) -> Path:
        import numpy as np

        array = np.array([Evil(folder)], dtype=object)
        np.save(folder / name, array, allow_pickle=True) if name.endswith("y") else np.savez(folder / name, a=array)
        return folder / name

    return write


def evil_folder(name: str, *more: str) -> Writer:
    def write(folder: Path) -> Path:
        for file_name in more:
            (folder / "hf").mkdir(exist_ok=True)
            holding(file_name, json.dumps(config_to_hf(SMALL)).encode())(folder / "hf")
        return evil(f"hf/{name}")(folder).parent

    return write


PICKLES: Cases = {
    ".bin": (evil("x.bin"), r"\.bin file can run code .* give model\.safetensors"),
    ".pkl": (evil("x.pkl"), r"\.pkl file can run code .* give model\.safetensors"),
    ".npy": (evil_array("x.npy"), r"\.npy file can run code .* give model\.safetensors"),
    ".npz": (evil_array("x.npz"), r"\.npz file can run code .* give model\.safetensors"),
    "renamed .pt": (evil("x.pt"), r"a pickle can run code; give a \.safetensors"),
    "renamed .safetensors": (evil("x.safetensors"), "not a readable safetensors file"),
    "renamed .gguf": (evil("x.gguf"), "not a readable GGUF file"),
    "renamed .json": (evil("x.json"), "not recognised as weights; give"),
    "a folder of pytorch_model.bin": (
        evil_folder("pytorch_model.bin", "config.json"),
        r"holds pytorch_model\.bin only, which can run code .* give model\.safetensors",
    ),
    "a folder of its shards": (evil_folder("pytorch_model-00001-of-00002.bin"), r"give model\.safetensors"),
    "as a folder's weights": (evil_folder("model.safetensors", "config.json"), "not a readable safetensors file"),
}
