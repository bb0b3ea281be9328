"""A text that cannot be encoded stops a preparation, is skipped or gets U+FFFD; special tokens are text by default."""

import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import smollm_jax.data.text
from smollm_jax.commands import prepare as prepare_data
from smollm_jax.data.bad_text import BadTextHandler
from smollm_jax.data.mixture import open_mixture
from smollm_jax.data.plan import Settings, can_cut, make_plan
from smollm_jax.data.text import documents
from smollm_jax.data.token_file import TokenSet
from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.tokenizer.gguf import build_tokenizer, tokenizer_files
from smollm_jax.tokenizer.special_tokens import byte_symbols
from tests.data.test_file_types import folder
from tests.hostile_data import strings
from tests.small_files import tokenizer_folder

CONTROL, HALF = "1990\x131995", "a\ud800b"
CHAT = "<|im_start|>user\nhi<|im_end|>\n"


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    """A tokenizer that lacks U+0013, as SmolLM2's does."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    symbols = [symbol for byte, symbol in enumerate(byte_symbols()) if byte != 0x13]
    files = tokenizer_files(
        build_tokenizer([*special, *symbols], [], special), 64, {"eos": special[0]}, "{{ messages }}"
    )
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer") / "t", **files)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path) -> Tokenizer:
    return Tokenizer.load(tokenizer_path)


@pytest.fixture(autouse=True)
def _signals(monkeypatch):
    """Restores pytest's signal handlers, which the script replaces."""
    monkeypatch.setattr("smollm_jax.runtime.signals.StopSignal.install", lambda self, doing: self)


def jsonl(*texts: str | None) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def table(**columns) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


CASES = {  # name: (content, what stops the reading, documents when skipped, when replaced)
    "a.jsonl": (jsonl("a", CONTROL, "b"), r"line 2 .* character 4, U\+0013", ["a", "b"], ["a", "1990�1995", "b"]),
    "b.jsonl": (jsonl("a", HALF), "line 2 .* lone surrogate", ["a"], ["a", "a�b"]),
    "c.jsonl": (jsonl("a", "b\0"), "line 2: 'text': character 1 is NUL", ["a"], ["a", "b�"]),
    "d.jsonl": (jsonl("a", None), "line 2: 'text' is null", ["a"], ["a"]),
    "e.jsonl": (jsonl("a") + b'{"text": "caf\xe9 \xe6\x97!"}\n', "byte 27 is not UTF-8", ["a"], ["a", "caf� �!"]),
    "f.jsonl": (jsonl("a") + b'{"text": "b\0"}\n', "line 2: character 11 is NUL", ["a"], ["a", "b�"]),
    "g.json": (json.dumps(["a", CONTROL]).encode(), r"element 2 .* U\+0013", ["a"], ["a", "1990�1995"]),
    "h.json": (b'[{"text": "\xe6\x97"}, "b"]', "byte 11 is not UTF-8", ["b"], ["�", "b"]),
    "i.csv": (b"text,n\nb\x13,1\nc,2\n", "line 2 .* character 1", ["c"], ["b�", "c"]),
    "j.csv": (b"n,text\n1,caf\xe9\n2,c\n3\n", "byte 12 is not UTF-8", ["c"], ["caf�", "c"]),
    "k.txt": (b"one\x13", r"document 1 .* character 3, U\+0013", [], ["one�"]),
    "l.txt": (b"caf\xe9 \xff\xfeand more than that\r\n" * 9, "byte 3 is not", [], ["caf� ��and more than that\n" * 9]),
    "m.parquet": (table(text=["a", None, CONTROL]), "row 2: 'text' is null", ["a"], ["a", "1990�1995"]),
    "n.parquet": (table(text=strings(b"a", b"caf\xe9")), "row 2: 'text' is not UTF-8", ["a"], ["a", "caf�"]),
}


@pytest.mark.parametrize("policy", ["skip", "replace"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_an_object_without_the_field_is_null_as_it_is_to_datasets(tmp_path, tokenizer_path, tokenizer, name, policy):
    (tmp_path / name).write_text('{"text": "a"}\n{"other": "b"}\n{"text": "c"}\n')
    with pytest.raises(InputFileError, match=r"2 .* has no column 'text', only"):
        list(documents(tmp_path / name))
    bad_text = BadTextHandler(policy, tokenizer.unencodable)
    assert list(documents(tmp_path / name, bad_text=bad_text)) == ["a", "c"]
    assert bad_text.skipped == 1
    with pytest.raises(InputFileError, match=r"skipped every document \(3\), none has a usable 'body'"):
        run(tmp_path / "set", tmp_path / name, tokenizer_path, "--on-bad-text", policy, "--text-column", "body")


@pytest.mark.parametrize("name", CASES)
def test_bad_text_stops_is_skipped_or_replaced_in_every_kind_of_file(tmp_path, tokenizer, name):
    content, stops, skipped, replaced = CASES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputFileError, match=f"{stops}.*; --on-bad-text skip leaves out such documents"):
        list(documents(tmp_path / name, bad_text=BadTextHandler("stop", tokenizer.unencodable)))
    bad_text = BadTextHandler("skip", tokenizer.unencodable)
    assert list(documents(tmp_path / name, bad_text=bad_text)) == skipped
    assert bad_text.skipped == {"j.csv": 2, "m.parquet": 2}.get(name, 1)
    bad_text = BadTextHandler("replace", tokenizer.unencodable)
    texts = list(documents(tmp_path / name, bad_text=bad_text))
    assert texts == replaced
    assert bad_text.replaced == "".join(texts).count("�")
    assert all(tokenizer.unencodable(text) is None for text in texts)


def test_what_is_no_text_at_all_is_not_made_one_by_replacing(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_bytes(bytes(range(256)) * 9)
    with pytest.raises(InputFileError, match="looks like binary data"):
        list(documents(tmp_path / "x.txt", bad_text=BadTextHandler("replace", tokenizer.unencodable)))
    with pytest.raises(InputFileError, match=r"cannot encode the replacement character U\+FFFD"):
        BadTextHandler("replace", lambda text: "no" if "�" in text or "x" in text else None).clean("x", "a place")


def run(out: Path, source: Path, tokenizer: Path, *flags: str) -> dict:
    prepare_data.main([str(source), "--out", str(out), "--tokenizer", str(tokenizer), *flags])
    return json.loads((out / "manifest.json").read_text())


def decoded(folder: Path, tokenizer: Tokenizer) -> list[str]:
    texts = []
    for file in TokenSet.open(folder).files:
        starts = [0, *file.ends[:-1].tolist()]
        texts += [tokenizer.decode(file.tokens[a:b]) for a, b in zip(starts, file.ends.tolist(), strict=True)]
    return texts


def test_what_was_skipped_and_replaced_is_counted_said_and_recorded(tmp_path, tokenizer_path, tokenizer, capsys):
    for name, (content, *_) in CASES.items():
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / name).write_bytes(content)
    for policy, path, count, message in (
        ("skip", 2, {"documents_skipped": 16}, "--on-bad-text skipped 16 documents without usable text"),
        (
            "replace",
            3,
            {"documents_skipped": 3, "characters_replaced": 40},
            "--on-bad-text replaced 40 characters by U+FFFD",
        ),
    ):
        manifest = run(tmp_path / policy, tmp_path / "source", tokenizer_path, "--on-bad-text", policy)
        expected = [f"{text}<|endoftext|>" for case in CASES.values() for text in case[path]]
        assert sorted(decoded(tmp_path / policy, tokenizer)) == sorted(expected)
        assert "".join(expected).count("�") == count.get("characters_replaced", 0)
        assert (manifest["on_bad_text"], manifest["counts"]) == (policy, count)
        assert f"{tmp_path / policy}: {message}\n" in capsys.readouterr().out
        run(tmp_path / policy, tmp_path / "source", tokenizer_path, "--on-bad-text", policy)
        assert message in capsys.readouterr().out, "a second start does not say so"
    (tmp_path / "all").mkdir()
    (tmp_path / "all/x.jsonl").write_bytes(jsonl(CONTROL))
    with pytest.raises(InputFileError, match=r"holds no text: --on-bad-text skipped every document \(1\)"):
        run(tmp_path / "none", tmp_path / "all", tokenizer_path, "--on-bad-text", "skip")


def test_the_same_bytes_however_many_work_and_however_often_it_is_stopped(tmp_path, tokenizer_path):
    """Also with work units without a text, and a unit that continues after a skipped document."""
    source = tmp_path / "source"
    source.mkdir()
    for i in range(6):
        rows = [f"document {n} of {i} <|im_end|>" + "\x13" * (n % 3 == 0) for n in range(60)]
        (source / f"{i}.jsonl").write_bytes(jsonl(*(rows if i != 2 else [CONTROL] * 60)))
        (source / f"{i}.txt").write_bytes(b"plain text " * 400 + b"\x13" * (i % 2))
    flags = ["--on-bad-text", "skip", "--shard-tokens", "200"]
    manifest = run(tmp_path / "one", source, tokenizer_path, *flags, "--workers", "1")
    assert manifest["counts"] == {"documents_skipped": 163, "documents_with_special_tokens": 200}
    run(tmp_path / "three", source, tokenizer_path, *flags, "--workers", "3")
    files = {path.relative_to(tmp_path / "one"): path.read_bytes() for path in (tmp_path / "one").rglob("*.*")
             if path.is_file()}  # fmt: skip
    for out, file_count in (("three", None), ("one", 0), ("one", 7), ("one", -1)):
        if file_count is not None:
            (tmp_path / out / "manifest.json").unlink()
            for file in sorted((tmp_path / out).glob("0*-*"))[file_count:]:
                shutil.rmtree(file)
            run(tmp_path / out, source, tokenizer_path, *flags)
        assert {path: (tmp_path / out / path).read_bytes() for path in files} == files, (out, file_count)


def test_a_long_plain_text_is_skipped_whole(tmp_path, tokenizer_path, tokenizer, monkeypatch):
    monkeypatch.setattr(smollm_jax.data.text, "PIECE", 100)
    source = folder(tmp_path / "source", "bad.txt", "good.txt", bad=b"a word\n" * 3000 + b"\x13", good=b"b\n" * 3000)
    run(tmp_path / "set", source, tokenizer_path, "--on-bad-text", "skip", "--shard-tokens", "100")
    assert "".join(decoded(tmp_path / "set", tokenizer)) == "b\n" * 3000 + "<|endoftext|>"
    assert len(make_plan([source / "bad.txt"], Settings(tokenizer_path, shard_tokens=100)).units) > 9


def test_a_begun_set_is_gone_on_with_under_its_own_settings(tmp_path, tokenizer_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl("a", CHAT))
    run(tmp_path / "set", tmp_path / "x.jsonl", tokenizer_path, "--on-bad-text", "skip", "--special-tokens")
    for flags, named in (
        ([], "was started with on_bad_text 'skip', not 'stop'"),
        (["--on-bad-text", "replace", "--special-tokens"], "on_bad_text 'skip', not 'replace'"),
        (["--on-bad-text", "skip"], "was started with special_tokens True, not False"),
    ):
        with pytest.raises(UsageError, match=named):
            run(tmp_path / "set", tmp_path / "x.jsonl", tokenizer_path, *flags)
    # A set of a version that had no choice, or of one that did not use it.
    manifest = run(tmp_path / "old", tmp_path / "x.jsonl", tokenizer_path)
    assert {"on_bad_text", "special_tokens", "kinds"}.isdisjoint(
        {*manifest, *json.loads((tmp_path / "old/plan.json").read_text())}
    )
    run(tmp_path / "old", tmp_path / "x.jsonl", tokenizer_path)
    with pytest.raises(UsageError, match="was started with special_tokens False, not True"):
        run(tmp_path / "old", tmp_path / "x.jsonl", tokenizer_path, "--special-tokens")


def test_what_an_older_version_read_as_something_else_is_another_plan(tmp_path, tokenizer_path):
    """Otherwise tokens of a .json file that the old version read as plain text would stay in the data set."""
    (tmp_path / "x.json").write_bytes(jsonl("a"))
    (tmp_path / "x.jsonl").write_bytes(jsonl("a"))
    for name, kinds in (("x.json", {"x.json": "JSON lines"}), ("x.jsonl", None)):
        content = make_plan([tmp_path / name], Settings(tokenizer_path), by_content=True).content()
        assert content.get("kinds") == kinds


# --------------------------------------------------------------------------------------------- special tokens


def test_special_tokens_of_a_corpus_are_special_on_request_and_else_there_is_a_warning(
    tmp_path, tokenizer_path, tokenizer, capsys
):
    texts = [CHAT, CHAT + "more<|endoftext|>", "none"]
    (tmp_path / "x.jsonl").write_bytes(jsonl(*texts))
    manifest = run(tmp_path / "plain", tmp_path / "x.jsonl", tokenizer_path)
    assert manifest["counts"] == {"documents_with_special_tokens": 2}
    warning = f"{tmp_path / 'plain'}: warning: special tokens in 2 documents are read as plain text"
    assert [warning in line and "add --special-tokens" in line for line in capsys.readouterr().out.splitlines()].count(
        True
    ) == 1
    (file,) = TokenSet.open(tmp_path / "plain").files
    assert file.tokens.tolist().count(1) == 0
    run(tmp_path / "special", tmp_path / "x.jsonl", tokenizer_path, "--special-tokens")
    assert "warning" not in capsys.readouterr().out
    (file,) = TokenSet.open(tmp_path / "special").files
    assert [file.tokens.tolist().count(i) for i in (1, 2)] == [2, 2]
    assert file.tokens.tolist().count(0) == 3, "a document's own end of text is doubled"
    assert sorted(decoded(tmp_path / "special", tokenizer)) == sorted(
        [f"{CHAT}<|endoftext|>", texts[1], "none<|endoftext|>"]
    )
    open_mixture(tmp_path / "special", tokenizer_path, tmp_path / "cache", special_tokens=True)
    with pytest.raises(UsageError, match="plain: was prepared without --special-tokens"):
        open_mixture(tmp_path / "plain", tokenizer_path, tmp_path / "cache", special_tokens=True)


def test_a_long_text_is_not_cut_within_a_special_token(tmp_path, tokenizer_path, tokenizer, monkeypatch):
    monkeypatch.setattr(smollm_jax.data.text, "PIECE", 40)
    text = "some <|im_start|>user\nhi <|im_end|>\n" * 200
    (tmp_path / "x.txt").write_text(text)
    run(tmp_path / "set", tmp_path / "x.txt", tokenizer_path, "--special-tokens", "--shard-tokens", "300")
    ids = [i for file in TokenSet.open(tmp_path / "set").files for i in file.tokens.tolist()]
    assert len(TokenSet.open(tmp_path / "set").files) > 3
    assert ids == [*tokenizer.encode(text, parse_special=True), 0]
    other = Tokenizer.load(tokenizer_folder(tmp_path / "t"))
    assert can_cut(other, special_tokens=True)
    other.core.add_special_tokens(["<|two words|>"])
    assert (can_cut(other), can_cut(other, special_tokens=True)) == (True, False)
    other.core.add_tokens(["New York"])  # found in a text whether special tokens are or not
    assert not can_cut(other)
