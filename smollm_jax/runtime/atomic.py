"""Atomic writes: a temporary sibling is written, fsynced and renamed to the target. Imports no framework."""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from smollm_jax.errors import InputFileError, SmolLMError, StorageError, UsageError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path next to `target`: renamed to `target` when the block succeeds, removed when it raises.

    What a killed process left of the same target is removed first. Raises `UsageError` if `target` exists, because
    nothing is overwritten, and `StorageError` if it cannot be written.
    """
    if target.exists():
        raise UsageError(f"{target}: exists already; name another target or remove it first")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    folder = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        _remove_leftovers(target, folder)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:  # fsync before the rename
            sync(path)
        os.rename(temporary, target)
        sync(target.parent)
    except SmolLMError as error:
        raise type(error)(str(error).replace(str(temporary), str(target))) from error
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        reason = str(error).replace(str(temporary), str(target))
        raise StorageError(f"{target}: cannot be written: {reason}") from error
    finally:
        _remove(temporary)
        if folder is not None:
            os.close(folder)


def _remove_leftovers(target: Path, folder: int) -> None:
    """Removes the temporary paths of `target` that no process writes, and locks the open `folder` as one written to.

    A writer holds a shared lock of the folder, which the kernel releases however it ends; an exclusive one is to be had
    only while nobody writes there. A file system without such locks keeps the paths.
    """
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(OSError):
        if leftovers := [path for path in target.parent.iterdir() if name.fullmatch(path.name)]:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for path in leftovers:
                    print(f"note: {path}: left behind by a process that was killed: removed", file=sys.stderr)
                    _remove(path)
        fcntl.flock(folder, fcntl.LOCK_SH)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def overwrite(path: Path, content: bytes) -> None:
    """Writes a file, replacing one that is there: a reader meets the old content or the new one, whole."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Calls fsync on a file, or on a directory for its new and renamed entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hex."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read: {error}") from error
