"""Files that are complete or not there: written beside the target, synced, then renamed. Imports no framework."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from smollm_jax.errors import InputFileError, SmolLMError, StorageError, UsageError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary sibling to write; renamed to `target` when the block ends well, removed when it does not.

    Raises `UsageError` if `target` exists: nothing is overwritten.
    """
    if target.exists():
        raise UsageError(f"{target}: exists already; name another target or remove it first")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:  # on the disk before it has its name
            sync(path)
        os.rename(temporary, target)
        sync(target.parent)
    except SmolLMError as error:
        raise type(error)(str(error).replace(str(temporary), str(target))) from error
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        reason = str(error).replace(str(temporary), str(target))
        raise StorageError(f"{target}: cannot be written: {reason}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Puts a file's bytes, or a directory's entries (new names and renames), on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hex."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read: {error}") from error
