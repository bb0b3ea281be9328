"""A training's folder: which one is meant, and that a start that is refused leaves none behind. Framework-free."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from smollm_jax.checkpoint import steps_in
from smollm_jax.errors import CheckpointError, UsageError
from smollm_jax.lock import FILE as LOCK


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
