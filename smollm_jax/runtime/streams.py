"""Standard streams that are closed, whose reader is gone, or whose encoding lacks characters.

Imports nothing of ours: `program.run_main` calls `prepare` first in every script.
"""

import errno
import io
import os
import select
import sys
from typing import Any

closed: set[int] = set()  # those of the descriptors 0, 1 and 2 that were closed when the process started


class OutputError(Exception):
    """stdout cannot be written. Not an `OSError`, so that no handler mistakes it for a file's."""

    def __init__(self, error: OSError):
        super().__init__(f"stdout: cannot be written: {error.strerror}")
        self.reader_gone = error.errno == errno.EPIPE


def prepare() -> None:
    """Makes stdin, stdout and stderr usable in any shell and locale.

    A closed stream is opened on /dev/null, so that no file that is opened later gets its descriptor. Characters that
    the encoding lacks are written as escapes. Errors on stderr are ignored; one on stdout raises `OutputError`.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            closed.add(descriptor)
            # open() takes the lowest free descriptor, which is this one. Child processes inherit it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # open until the process ends
    elif isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.encoding.lower() in ("ascii", "us-ascii"):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # the encoding of files
    if sys.stdout is sys.__stdout__:  # not replaced by a test
        sys.stdout = _open_output(1, sys.stdout, ignore_errors=False)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _open_output(2, sys.stderr, ignore_errors=True)


def no_text_on_stdin() -> bool:
    """Whether stdin is closed or a terminal."""
    return 0 in closed or sys.stdin is None or sys.stdin.isatty()


def pipe_safe(stream: Any) -> io.TextIOWrapper:
    """The same output, discarded from the first error on: a reader that has gone (`| head`), a closed terminal."""
    return _open_output(stream.fileno(), stream, ignore_errors=True)


def _open_output(descriptor: int, stream: Any, *, ignore_errors: bool) -> io.TextIOWrapper:
    encoding, line_buffering = "utf-8", True
    if stream is not None:
        stream.flush()
        encoding = stream.encoding
        line_buffering = ignore_errors or stream.line_buffering or stream.write_through
    raw = io.BufferedWriter(_Output(descriptor, ignore_errors))
    return io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", line_buffering=line_buffering)


class _Output(io.RawIOBase):
    """A file descriptor to write to. After an error it is /dev/null, so that flushing raises no second one."""

    def __init__(self, descriptor: int, ignore_errors: bool):
        self._descriptor, self._ignore_errors = descriptor, ignore_errors

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data, /) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # another program made the shared terminal non-blocking
            select.select([], [self._descriptor], [])
            return self.write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._descriptor)
            os.close(null)
            if self._ignore_errors:
                return len(data)
            raise OutputError(error) from error
