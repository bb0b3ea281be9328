"""Assets come from the checkout, or without one from the user's cache, where they are fetched on first use."""

import sys
from pathlib import Path

import pytest

from smollm_jax.errors import StorageError
from smollm_jax.runtime import assets, install


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of assets when there is no checkout."""
    monkeypatch.setattr(install, "CHECKOUT", tmp_path / "site-packages")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/smollm-jax/assets"


def fake_fetch(program: str):
    return lambda what, into: [sys.executable, "-c", program, what, str(into)]


def test_a_checkout_uses_its_own_assets_and_fetches_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "fetch_command", fake_fetch("raise SystemExit('fetched')"))
    assert assets.folder() == Path("assets")
    assert assets.asset("sotu") == Path("assets/sotu")
    assert assets.resolve_asset(Path("assets/tokenizer")) == Path("assets/tokenizer")


def test_without_a_checkout_an_asset_is_fetched_once_with_a_line_on_stderr(cache, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    make = "import pathlib, sys; pathlib.Path(sys.argv[2], sys.argv[1]).mkdir(parents=True)"
    monkeypatch.setattr(assets, "fetch_command", fake_fetch(make))
    assert assets.folder() == cache
    for expected in (f"fetching assets/tokenizer into {cache}, once\n", ""):
        assert assets.resolve_asset(Path("assets/tokenizer")) == cache / "tokenizer"
        assert capsys.readouterr().err == expected


def test_only_a_missing_asset_is_looked_up_in_the_cache(cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "fetch_command", fake_fetch("raise SystemExit('fetched')"))
    (tmp_path / "assets/sotu").mkdir(parents=True)
    for path in ("assets/sotu", "assets/mine", "sotu", "runs/tokenizer", "/assets/tokenizer"):
        assert assets.resolve_asset(Path(path)) == Path(path)


def test_a_failed_fetch_is_one_error(cache, monkeypatch):
    monkeypatch.setattr(assets, "fetch_command", fake_fetch("raise SystemExit('a line\\nerror: no network')"))
    with pytest.raises(StorageError, match=r"^assets/sotu cannot be fetched: no network$"):
        assets.asset("sotu")
