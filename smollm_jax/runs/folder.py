"""A run folder: which one is meant, what lies in it beside checkpoints, and that a refused start leaves none behind.

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
    """The run under runs/ that was last at work and has a checkpoint."""
    begun = sorted((lock.stat().st_mtime, lock.parent) for lock in Path("runs").glob(f"*/{LOCK}"))
    for _, run in reversed(begun):
        if steps_in(run / "checkpoints"):
            return run
        print(f"note: {run} has no checkpoint, looking at the run before it")
    raise CheckpointError("--resume: no run under runs/ has a checkpoint; name one with --out")


def refuse_used(run: Path) -> None:
    """Raises `UsageError` when a run folder holds a checkpoint."""
    if steps := steps_in(run / "checkpoints"):
        raise UsageError(f"{run}: holds a run up to step {steps[-1]}: add --resume, or name another --out")


@contextlib.contextmanager
def emptied_unless_trained(run: Path) -> Iterator[None]:
    """Removes what the block wrote into a run folder that was empty, when it fails before a first step is logged.

    Enter it with the folder's lock held; the lock removes its own file and the folder.
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
    """Whether a run folder holds a checkpoint or the metrics of a step."""
    if steps_in(run / "checkpoints"):
        return True
    try:
        with (run / "metrics.jsonl").open(encoding="utf-8") as file:
            return any("loss" in json.loads(line) for line in file)
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True  # written to by more than this start: nothing is removed


def write_run_files(
    run: Path,
    config: Config,
    tokenizer_files: dict[str, bytes],
    dtype: str = "float32",
    generation_config: dict[str, Any] | None = None,
) -> None:
    """What lies beside the checkpoints of a run: configs and the tokenizer's files, each whole or as it was."""
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
