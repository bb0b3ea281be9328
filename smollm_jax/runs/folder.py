"""Run folders: finding the newest one, the config and tokenizer files in it, and clean-up after a failed start.

Framework-free.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smollm_jax.config import Config
from smollm_jax.config.generation_config import generation_text
from smollm_jax.config.hf_config import config_to_hf
from smollm_jax.errors import CheckpointError, StorageError, UsageError
from smollm_jax.runs.checkpoint import steps_in
from smollm_jax.runtime.atomic import sync
from smollm_jax.runtime.lock import FILE as LOCK


def newest_run() -> Path:
    """The run under runs/ that started last, among those with a checkpoint."""
    by_start = sorted((lock.stat().st_mtime, lock.parent) for lock in Path("runs").glob(f"*/{LOCK}"))
    for _, run in reversed(by_start):
        if steps_in(run / "checkpoints"):
            return run
        print(f"note: {run} has no checkpoint, trying the run before it")
    raise CheckpointError("--resume: no run under runs/ has a checkpoint; name one with --out")


def check_no_checkpoint(run: Path) -> None:
    """Raises `UsageError` if a run folder has a checkpoint."""
    if steps := steps_in(run / "checkpoints"):
        raise UsageError(f"{run}: has a checkpoint of step {steps[-1]}: add --resume, or choose another --out")


@contextlib.contextmanager
def clean_up_failed_start(run: Path) -> Iterator[None]:
    """If the block fails before a step is logged, removes what it wrote into a run folder that was empty before.

    The caller holds the folder's lock; the lock itself removes its file and the folder.
    """
    was_empty = sorted(path.name for path in run.iterdir()) == [LOCK]
    try:
        yield
    except BaseException:
        if was_empty and not _trained(run):
            for path in run.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != LOCK:
                    path.unlink(missing_ok=True)
        raise


def _trained(run: Path) -> bool:
    """Whether a run folder has a checkpoint or the metrics of a step."""
    if steps_in(run / "checkpoints"):
        return True
    try:
        with (run / "metrics.jsonl").open(encoding="utf-8") as file:
            return any("loss" in json.loads(line) for line in file)
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True  # the file is not from this start alone: keep everything


def write_run_files(
    run: Path,
    config: Config,
    tokenizer_files: dict[str, bytes],
    dtype: str = "float32",
    generation_config: dict[str, Any] | None = None,
) -> None:
    """Writes the configs and tokenizer files of a run, each atomically: complete, or unchanged after a failure."""
    run.mkdir(parents=True, exist_ok=True)
    texts = {"config.json": json.dumps(config_to_hf(config, dtype), indent=2) + "\n"}
    if generation_config is not None:
        texts["generation_config.json"] = generation_text(config, generation_config)
    for name, content in ({name: text.encode() for name, text in texts.items()} | tokenizer_files).items():
        target, temporary = run / name, run / f"{name}.tmp"
        target.parent.mkdir(exist_ok=True)
        if target.is_file() and target.read_bytes() == content:
            continue
        try:
            temporary.write_bytes(content)
            sync(temporary)
            temporary.rename(target)
            sync(run)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StorageError(f"{target}: cannot be written: {error.strerror}") from error
