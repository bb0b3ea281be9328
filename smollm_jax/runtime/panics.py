"""What the `tokenizers` library makes of a malformed file: its panics as one line, and nothing on the terminal."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from smollm_jax.errors import InputFileError
from smollm_jax.runtime.files import one_line

T = TypeVar("T")


def quietly(work: Callable[[], T], path: str) -> T:
    """What `tokenizers` makes of a file, its panics as `InputFileError`."""
    try:
        with silent_stderr():
            return work()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # malformed files make tokenizers raise PanicException, no Exception at all
        raise InputFileError(f"{path}: not a readable tokenizer: {one_line(error)}") from error


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Nothing written to file descriptor 2 gets out: Rust prints a panic and its stack there before Python hears of it.

    The whole process's, so the block must be short.
    """
    if sys.stderr:
        sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # closed: nothing gets out anyway
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
