"""What a training is given to read, looked at before anything is made, planned or compiled. Imports no JAX."""

from collections.abc import Sequence
from pathlib import Path

from smollm_jax import weights
from smollm_jax.data.mixture import parse_source
from smollm_jax.data.text_sources import text_files
from smollm_jax.data.token_file import MANIFEST
from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.tokenizer.source import own_tokenizer
from smollm_jax.training.flags import TrainingFlags

SOTU = "assets/sotu"


def check(flags: TrainingFlags) -> None:
    """Raises the error that names the flag's path which is missing or cannot be what it has to be."""
    if flags.data is not None or not flags.resume:
        check_sources(flags.data if flags.data is not None else (SOTU,))
    for name in ("init_from", "reference"):
        path: Path | None = getattr(flags, name)
        if path is not None and not (flags.resume and name == "init_from"):
            weights.kind_of(path)
    if flags.tokenizer is not None and own_tokenizer(flags.tokenizer) is None:
        raise InputFileError(f"{flags.tokenizer / 'tokenizer.json'}: no such file; --tokenizer names its folder")
    if flags.track is not None:
        from smollm_jax.runs import tracking

        tracking.check_installed(flags.track)


def check_sources(sources: Sequence[str]) -> None:
    """Raises `InputFileError` for a source that is missing or holds no text, `UsageError` for wrong weights."""
    named = [parse_source(source) for source in sources]
    if not named or len({weight is None for _, weight in named}) > 1:
        raise UsageError("--data: give a weight to every source or to none: PATH:WEIGHT")
    for path, _ in named:
        folder = path.parent if path.name == "tokens.bin" else path
        if any((folder / name).is_file() for name in (MANIFEST, "tokens.json")):
            continue
        if str(path) == SOTU and not path.exists():
            raise InputFileError(f"{SOTU}: no such folder; name --data, or run python scripts/fetch_assets.py text")
        text_files(path)
