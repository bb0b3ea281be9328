"""File types are detected from content and name; of a folder, only text of the training split is read."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

import smollm_jax.data.text
from smollm_jax.data import text_tables
from smollm_jax.data.bad_text import BadTextHandler
from smollm_jax.data.text import documents, whole_file
from smollm_jax.data.text_sources import select_files, text_files
from smollm_jax.errors import InputFileError
from tests.hostile_data import zst

DOCUMENTS = ["one\ntwo", 'th"ree, é']
LINES = "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in DOCUMENTS).encode()
ARRAY = json.dumps([{"text": text} for text in DOCUMENTS], indent=1).encode()
CSV = 'n,text\r\n1,"one\ntwo"\r\n\r\n2,"th""ree, é"\r\n'.encode()
MARK = b"\xef\xbb\xbf"  # the byte order mark that Windows' editors write
PLAIN = b"one word\nand others\n"


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), sink)
    return sink.getvalue().to_pybytes()


def arrow(stream: bool) -> bytes:
    sink, table = pyarrow.BufferOutputStream(), pyarrow.table({"text": DOCUMENTS}).to_batches(max_chunksize=1)
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(sink, table[0].schema) as writer:
        for batch in table:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


ROWS = {  # name: content
    "x.jsonl": LINES,
    "x.ndjson": LINES,
    "x.JSONLines": LINES,
    "c4.00000-of-01024.json.gz": gzip.compress(LINES),
    "x.json.xz": lzma.compress(LINES) + bytes(4) + lzma.compress(b""),
    "x.jsonl.bz2": bz2.compress(LINES[:40]) + bz2.compress(LINES[40:]),
    "x.jsonl.zstd": zst(LINES),
    "zstd after a frame to skip.jsonl.zst": b"\x50\x2a\x4d\x18\x02\0\0\0ab" + zst(LINES),
    "lines.json": LINES,
    "array.json": ARRAY,
    "strings.json": json.dumps(DOCUMENTS).encode(),
    "one after another.json": b"".join(json.dumps({"text": text}, indent=2).encode() for text in DOCUMENTS),
    "array called.jsonl": ARRAY,
    "no name for lines": LINES,
    "no name for an array": ARRAY,
    "app.log": LINES,
    "dump.gz": gzip.compress(LINES),
    "gzip called.jsonl": gzip.compress(LINES),
    "x.csv": CSV,
    "marked.csv": MARK + CSV,
    "x.csv.gz": gzip.compress(CSV),
    "marked.csv.gz": gzip.compress(MARK + CSV),
    "lines end in CR.csv": CSV.replace(b"\r\n", b"\r"),
    "marked.jsonl": MARK + LINES,
    "marked, no name for lines": MARK + LINES,
    "marked.jsonl.gz": gzip.compress(MARK + LINES),
    "marked lines.json": MARK + LINES,
    "marked array.json": MARK + ARRAY,
    "numbers nobody reads.jsonl": LINES.replace(b'"n": 1', b'"n": [NaN, {"x": -Infinity}, 1e999]'),
    "numbers nobody reads.json": ARRAY.replace(b"{", b'{"n": NaN, '),
    "x.tsv": 'text\tn\n"one\ntwo"\t1\n"th""ree, é"\n'.encode(),
    "x.parquet": parquet(),
    "x.pq": parquet(),
    "parquet called.jsonl": parquet(),
    "parquet": parquet(),
    "stream.arrow": arrow(stream=True),
    "file.arrow": arrow(stream=False),
    "x.feather": arrow(stream=False),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("piece", [7, smollm_jax.data.text.PIECE])
def test_rows_are_found_under_every_name(tmp_path, monkeypatch, name, piece):
    monkeypatch.setattr(smollm_jax.data.text, "PIECE", piece)
    (tmp_path / name).write_bytes(ROWS[name])
    assert list(documents(tmp_path / name)) == DOCUMENTS


@pytest.mark.parametrize("name", ["x.txt", "x.md", "x.rst", "x.tex", "x.py", "x.log", "x", "x.yaml"])
def test_what_is_plain_text_and_was_named_is_one_document(tmp_path, name):
    for content in (PLAIN, b"[Verse 1]\nla\n", b'{"a": 1} is JSON\nin a text\n', b'["a", she said, "b"]\n', b"{x}\n"):
        (tmp_path / name).write_bytes(content)
        assert list(documents(tmp_path / name)) == [content.decode()]
        for suffix, pack in ((".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)):
            (tmp_path / f"{name}{suffix}").write_bytes(pack(content))
            assert list(documents(tmp_path / f"{name}{suffix}")) == [content.decode()]


@pytest.mark.parametrize("bad_text", ["stop", "skip", "replace"])
def test_one_byte_order_mark_is_left_out_as_by_utf_8_sig(tmp_path, bad_text):
    for content in (MARK + PLAIN, MARK + MARK + PLAIN, MARK + b"no line end", PLAIN + MARK):
        (tmp_path / "x.txt").write_bytes(content)
        assert list(documents(tmp_path / "x.txt", bad_text=BadTextHandler(bad_text))) == [content.decode("utf-8-sig")]
    (tmp_path / "x.txt").write_bytes(MARK + LINES)
    with pytest.raises(InputFileError, match="holds JSON lines, not plain text"):
        list(documents(tmp_path / "x.txt"))


@pytest.mark.parametrize(
    "text", ["PARENTS of the", "PAR1 and PAR1", "a" * 256 + "gustar  mucho", "BZh9 GIF89a", "<p>x"]
)
def test_a_text_that_only_begins_like_another_format_is_a_text(tmp_path, text):
    text += ", and so on."
    (tmp_path / "x.txt").write_text(text)
    assert list(documents(tmp_path / "x.txt")) == [text]


def test_another_column_is_text_in_every_table(tmp_path):
    (tmp_path / "x.csv").write_text("text,body\nno,yes\n")
    (tmp_path / "x.json").write_text('[{"text": "no", "body": "yes"}]')
    pyarrow.feather.write_feather(pyarrow.table({"text": ["no"], "body": ["yes"]}), tmp_path / "x.arrow")
    for file in text_files(tmp_path):
        assert list(documents(file, "body")) == ["yes"]


def test_a_column_of_categories_is_one_of_text(tmp_path):
    table = pyarrow.table({"text": pyarrow.array([*DOCUMENTS, DOCUMENTS[0]]).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    pyarrow.feather.write_feather(table, tmp_path / "x.arrow")
    for name in ("x.parquet", "x.arrow"):
        assert list(documents(tmp_path / name)) == [*DOCUMENTS, DOCUMENTS[0]]


# -------------------------------------------------------------------------------------------------- folders

CARD = b"---\nlicense: mit\n---\n# A data set\n"


def folder(parent: Path, *names: str, **contents: bytes) -> Path:
    """A folder of small files; the suffix of a name decides the content."""
    for name in names:
        path = parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kinds = {".jsonl": LINES, ".csv": CSV, ".json": ARRAY, ".parquet": parquet(), ".gz": gzip.compress(LINES)}
        path.write_bytes(contents.get(path.stem, kinds.get(path.suffix, b"some text")))
    return parent


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "HuggingFaceFW/fineweb",
            "folder; to use a data set of .* first: hf download --repo-type dataset Hugg",
        ),
        ("https://a.org/x.jsonl", "URLs are not downloaded: download the file"),
        ("nowhere/x.jsonl", "no such file or folder$"),
        ("here/x", "no such file or folder$"),
    ],
)
def test_what_is_not_on_the_disk_is_named_with_what_to_do(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputFileError, match=message):
        select_files(Path(source))


def test_a_link_to_a_file_that_is_read_itself_is_left_out(tmp_path):
    path = folder(tmp_path / "d", "b.txt", "sub/c.txt")
    blob = folder(tmp_path / "cache", "blob") / "blob"  # as in the hub's cache
    for name, target in {"a.txt": "b.txt", "z.txt": "sub/c.txt", "x.txt": blob, "y.txt": blob}.items():
        (path / name).symlink_to(target)
    files, (note,) = select_files(path)
    assert [file.name for file in files] == ["b.txt", "c.txt", "x.txt"]
    assert note == f"{path}: reads 3 files, skips 3 link to a file that is also read (a.txt, y.txt, z.txt)"
    files, (note,) = select_files(path / "*.txt")
    assert [file.name for file in files] == ["b.txt", "x.txt", "z.txt"]
    assert "skips 2 link to a file that is also read" in note


def names(path: Path, **options) -> list[str]:
    return [str(file.relative_to(path)) for file in select_files(path, **options).files]


def test_what_is_hidden_strange_or_about_the_data_is_left_out_counted_and_said(tmp_path):
    path = folder(
        tmp_path / ".data", "a.txt", "b/c.md", ".git/info.txt", ".git/HEAD", "b/.ipynb_checkpoints/c.md", "._a.txt",
        ".DS_Store", "__MACOSX/a.txt", "photo.png", "other.PNG", "LICENSE", "b/LICENSE-MIT.txt", "notes.docx",
    )  # fmt: skip
    (path / "link").symlink_to(tmp_path)
    (note,) = select_files(path).notes
    assert names(path) == ["a.txt", "b/c.md"]
    assert note.startswith(f"{path}: reads 2 files, skips ")
    for part in (
        "5 hidden (.git, __MACOSX, .DS_Store, ...)",
        "3 with another suffix (.png (2), .docx)",
        "2 licence (LICENSE, b/LICENSE-MIT.txt)",
        "1 linked folder or special file (link)",
    ):
        assert part in note
    assert select_files(folder(tmp_path / "plain", "a.txt", "b.txt")).notes == []


def test_a_data_set_is_told_from_the_files_about_it(tmp_path):
    hub = folder(
        tmp_path / "hub", "README.md", ".gitattributes", "dataset_infos.json", "data/train-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet", README=CARD,
    )  # fmt: skip
    assert names(hub) == ["data/train-00000-of-00001.parquet"]
    skipped, split = select_files(hub).notes
    assert "1 dataset card (README.md)" in skipped
    assert "1 metadata of a data set (dataset_infos.json)" in skipped
    assert split == f"{hub}: reads the train split (1 file), skips test (1 file)"
    assert names(folder(tmp_path / "card", "README.md", "a.txt", README=CARD)) == ["a.txt"]
    assert names(folder(tmp_path / "docs", "README.md", "a.md")) == ["README.md", "a.md"]
    assert names(folder(tmp_path / "saved", "state.json", "x.jsonl", "cache-1.arrow")) == ["x.jsonl"]
    essays = folder(tmp_path / "essays", "a.txt", "meta.csv", "all.json", meta=b"id,title\n1,x\n", all=b'{"id": 1}')
    assert names(essays) == ["a.txt"]
    assert "2 metadata of a data set (all.json, meta.csv)" in select_files(essays).notes[0]
    assert names(essays, column="title") == ["a.txt", "meta.csv"]
    with pytest.raises(
        InputFileError, match=r"holds no file with the suffix .*; it has only 1 with another suffix \(\.png\)"
    ):
        select_files(folder(tmp_path / "none", "a.png"))


@pytest.mark.parametrize(
    ("files", "expected", "message"),
    [
        (["train.jsonl", "test.jsonl", "valid.csv"], ["train.jsonl"], "skips test (1 file), validation (1 file)"),
        (["train.txt", "test.txt", "val.txt"], ["train.txt"], "reads the train split (1 file)"),
        (["wiki.train.txt", "wiki.valid.txt"], ["wiki.train.txt"], "skips validation"),
        (["Train/a.txt", "Train/b.txt", "Dev/a.txt"], ["Train/a.txt", "Train/b.txt"], "skips validation"),
        (["en/train-0.json", "en/test-0.json", "x.json"], ["en/train-0.json", "x.json"], "skips test"),
        # Essays: a word in a name makes no split of a data set.
        (["a.txt", "b.txt", "test.txt"], ["a.txt", "b.txt", "test.txt"], None),
        (["my train ride.txt", "test.txt", "to val.txt"], ["my train ride.txt", "test.txt", "to val.txt"], None),
        (["contest.jsonl", "trainer.jsonl"], ["contest.jsonl", "trainer.jsonl"], None),
        (["test.jsonl", "a/evaluation.jsonl"], ["a/evaluation.jsonl", "test.jsonl"], "no train split: reads test"),
        (["dev.jsonl", "test.jsonl"], ["dev.jsonl", "test.jsonl"], "no train split: reads test and validation"),
    ],
)
def test_of_splits_the_one_to_train_on_is_read_and_said(tmp_path, files, expected, message):
    selected = select_files(folder(tmp_path / "x", *files))
    assert names(tmp_path / "x") == expected
    assert bool(selected.notes) == bool(message)
    assert message is None or message in selected.notes[0]


def test_evaluation_takes_the_split_to_test_on(tmp_path):
    path = folder(tmp_path / "x", "train.jsonl", "test.jsonl", "valid.jsonl")
    assert names(path, splits=("test", "validation")) == ["test.jsonl"]
    (path / "test.jsonl").unlink()
    assert names(path, splits=("test", "validation")) == ["valid.jsonl"]


def test_what_is_named_is_read_and_splits_among_it_are_said(tmp_path):
    path = folder(tmp_path / "x", "train-0.jsonl", "test-0.jsonl", "sub/a.py")
    selected = select_files(path / "*.jsonl")
    assert [file.name for file in selected.files] == ["test-0.jsonl", "train-0.jsonl"]
    assert selected.notes == [f"{path}/*.jsonl: note: reads every named file, also of other splits: test (1 file)"]
    assert [file.name for file in select_files(path / "**").files] == ["a.py", "test-0.jsonl", "train-0.jsonl"]


def test_parquet_that_would_fill_the_memory_is_refused_or_read_in_smaller_batches(tmp_path, monkeypatch):
    path, limit = tmp_path / "x.parquet", 1 << 10
    monkeypatch.setattr(text_tables, "PAGE_OVERHEAD", 100)

    def texts(values, **options) -> list[str]:
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), path, **options)
        return [chunk.text for chunk in text_tables.parquet_rows(whole_file(path), "text", BadTextHandler(), limit)]

    with pytest.raises(InputFileError, match=r"row group 1 has .* bytes in 1 rows, compressed to"):
        texts(["a" * 8192])
    with pytest.raises(InputFileError, match=r"row 2 is longer than 1,024 characters, so this is not text"):
        texts(["a", "b" * 1025, "c"])
    options = {"use_dictionary": False, "compression": "zstd", "write_statistics": False}
    with pytest.raises(InputFileError, match=r"row group 2 has .* bytes in 1,000 rows, compressed to"):
        texts(["abc"] * 1000 + ["z" * 1000] * 1000, row_group_size=1000, **options)
    rows = []
    read = pyarrow.parquet.ParquetFile.iter_batches

    def count_rows(self, **options):
        rows.append(options["batch_size"])
        return read(self, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", count_rows)
    values = [f"{i % 200:<1000}" for i in range(400)]  # 200 kB of dictionary, and each text twice
    assert texts(values) == values
    assert texts(["a"] * 100) == ["a"] * 100
    assert 0 < rows[0] * 1000 <= 64 * limit / 3
    assert rows[1] == 64


def test_blank_lines_are_counted_and_not_walked_one_by_one():
    block = smollm_jax.data.text._Block(b"\n\n {}\n \r\n\n\0x \n", 7, 3, 0.5)
    assert [tuple(line) for line in block.lines()] == [(b" {}", 9, 5, 0.5), (b"\0x ", 17, 8, 0.5)]
