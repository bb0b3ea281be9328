"""Standard streams that a shell closed, that lost their reader, or that cannot show every character.

Imports nothing of ours: `program.run_main` calls `prepare` first in every script.
"""

import errno
import io
import os
import select
import sys
from typing import Any

closed: set[int] = set()  # which of 0, 1 and 2 were closed when the process started


class OutputError(Exception):
    """stdout cannot be written. No `OSError`, so that nobody takes it for a fault of a file."""

    def __init__(self, error: OSError):
        super().__init__(f"stdout: cannot be written: {error.strerror}")
        self.reader_gone = error.errno == errno.EPIPE


def prepare() -> None:
    """Makes stdin, stdout and stderr usable whatever the shell and the locale made of them.

    A closed one reads and writes nothing, and keeps its descriptor, which the next opened file would get otherwise. A
    character that the encoding lacks is shown as an escape. A fault of stderr is no fault of the script; one of stdout
    is an `OutputError`.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            closed.add(descriptor)
            # Gets the lowest free number, which is this one; open for the processes that are started, too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # for as long as the process lives
    elif isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.encoding.lower() in ("ascii", "us-ascii"):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # as the files are
    if sys.stdout is sys.__stdout__:  # not what a test put in its place
        sys.stdout = _written(1, sys.stdout, lasting=False)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _written(2, sys.stderr, lasting=True)


def no_text_on_stdin() -> bool:
    """Whether nobody gave a text there: it was closed, or it is a terminal."""
    return 0 in closed or sys.stdin is None or sys.stdin.isatty()


def lasting(stream: Any) -> io.TextIOWrapper:
    """The same output, which goes on into nothing when it cannot be written: a `| head`, a closed terminal."""
    return _written(stream.fileno(), stream, lasting=True)


def _written(descriptor: int, stream: Any, *, lasting: bool) -> io.TextIOWrapper:
    encoding, lines = "utf-8", True
    if stream is not None:
        stream.flush()
        encoding, lines = stream.encoding, lasting or stream.line_buffering or stream.write_through
    raw = io.BufferedWriter(_Output(descriptor, lasting))
    return io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", line_buffering=lines)


class _Output(io.RawIOBase):
    """A descriptor to write to. After a fault it leads to nothing, so that what is buffered makes no second one."""

    def __init__(self, descriptor: int, lasting: bool):
        self._descriptor, self._lasting = descriptor, lasting

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data, /) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # another program that shares the terminal set it so
            select.select([], [self._descriptor], [])
            return self.write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._descriptor)
            os.close(nowhere)
            if self._lasting:
                return len(data)
            raise OutputError(error) from error
