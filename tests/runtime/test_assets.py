"""Assets are those of a checkout, and outside of one those of the user's cache, fetched when first asked for."""

import sys
from pathlib import Path

import pytest

from smollm_jax.errors import StorageError
from smollm_jax.runtime import assets, install


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of assets where there is no checkout."""
    monkeypatch.setattr(install, "CHECKOUT", tmp_path / "site-packages")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/smollm-jax/assets"


def bringing(program: str):
    return lambda what, into: [sys.executable, "-c", program, what, str(into)]


def test_a_checkout_has_its_own_and_nothing_is_fetched(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "fetching", bringing("raise SystemExit('fetched')"))
    assert assets.folder() == Path("assets")
    assert assets.asset("sotu") == Path("assets/sotu")
    assert assets.located(Path("assets/tokenizer")) == Path("assets/tokenizer")


def test_without_a_checkout_an_asset_is_fetched_once_and_that_is_said(cache, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    make = "import pathlib, sys; pathlib.Path(sys.argv[2], sys.argv[1]).mkdir(parents=True)"
    monkeypatch.setattr(assets, "fetching", bringing(make))
    assert assets.folder() == cache
    for said in (f"fetching assets/tokenizer into {cache}, once\n", ""):
        assert assets.located(Path("assets/tokenizer")) == cache / "tokenizer"
        assert capsys.readouterr().err == said


def test_only_an_asset_that_is_not_there_is_looked_for_elsewhere(cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "fetching", bringing("raise SystemExit('fetched')"))
    (tmp_path / "assets/sotu").mkdir(parents=True)
    for path in ("assets/sotu", "assets/mine", "sotu", "runs/tokenizer", "/assets/tokenizer"):
        assert assets.located(Path(path)) == Path(path)


def test_what_cannot_be_fetched_is_one_error(cache, monkeypatch):
    monkeypatch.setattr(assets, "fetching", bringing("raise SystemExit('a line\\nerror: no network')"))
    with pytest.raises(StorageError, match=r"^assets/sotu cannot be fetched: no network$"):
        assets.asset("sotu")
