"""Panics of the Rust library `tokenizers` on malformed files and in its regexes, turned into one-line errors."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from smollm_jax.errors import InputFileError
from smollm_jax.runtime.files import one_line

T = TypeVar("T")


def catch_panics(work: Callable[[], T], path: str, failure: str = "not a readable tokenizer") -> T:
    """The result of `work`; raises `InputFileError` naming `path` and `failure` when `tokenizers` raises or panics."""
    try:
        with silent_stderr():
            return work()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # PanicException derives from BaseException
        raise InputFileError(f"{path}: {failure}: {one_line(error)}") from error


class _Stderr:
    """File descriptor 2 while threads are in `silent_stderr`: the first redirects it, the last one restores it."""

    def __init__(self) -> None:
        self._lock, self._blocks, self._saved = threading.Lock(), 0, -1

    def redirect(self) -> None:
        with self._lock:
            self._blocks += 1
            if self._blocks > 1:
                return
            if sys.stderr:
                sys.stderr.flush()
            try:
                self._saved = os.dup(2)
            except OSError:  # stderr is closed
                self._saved = -1
                return
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os.close(null)

    def restore(self) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks and self._saved >= 0:
                os.dup2(self._saved, 2)
                os.close(self._saved)


_STDERR = _Stderr()


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Redirects file descriptor 2 to /dev/null: Rust prints a panic there before Python sees the exception.

    This affects the whole process, so the block must be short.
    """
    _STDERR.redirect()
    try:
        yield
    finally:
        _STDERR.restore()
