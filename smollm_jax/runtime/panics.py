"""Panics of the Rust library `tokenizers` on malformed files, turned into one-line errors."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from smollm_jax.errors import InputFileError
from smollm_jax.runtime.files import one_line

T = TypeVar("T")


def catch_panics(work: Callable[[], T], path: str) -> T:
    """The result of `work`; raises `InputFileError` naming `path` when `tokenizers` raises or panics."""
    try:
        with silent_stderr():
            return work()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # PanicException derives from BaseException
        raise InputFileError(f"{path}: not a readable tokenizer: {one_line(error)}") from error


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Redirects file descriptor 2 to /dev/null: Rust prints a panic there before Python sees the exception.

    This affects the whole process, so the block must be short.
    """
    if sys.stderr:
        sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
