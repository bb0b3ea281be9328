"""The errors a user can cause, each with its exit code. `runtime/program.py` prints such an error as one line.

Exit codes of every script: 0 finished, 1 bug, 2 usage or config, 3 bad input file, 4 no usable checkpoint, 5 storage,
6 locked by another process, 7 diverged, 8 another process of the run is gone, 75 stopped by a signal after a verified
save, 128 + n killed by signal n (a second one, or one that arrives before the trainer installs its handlers).

A closed stdin, stdout or stderr is replaced by /dev/null and does not change the exit code; neither does a stderr that
cannot be written. A full stdout exits with 5. A stdout whose reader is gone (`| head -1`) exits silently with 141, as
SIGPIPE does. The trainers and prepare_data.py go on without stdout, because their output is a file.
"""

import reprlib
from typing import Any


class SmolLMError(ValueError):
    """Base of the errors below: the message is one line that names the file, tensor, field or step."""

    exit_code = 1


class UsageError(SmolLMError):
    """A flag, a config field or a combination of them is invalid or not supported."""

    exit_code = 2


class InputFileError(SmolLMError):
    """An input file is missing, malformed or not of the type its name says."""

    exit_code = 3


class CheckpointError(SmolLMError):
    """No checkpoint of the run can be used."""

    exit_code = 4


class StorageError(SmolLMError):
    """A file or stream could not be written."""

    exit_code = 5


class LockedError(SmolLMError):
    """Another process holds the lock of the run folder or of the data set."""

    exit_code = 6


class DivergedError(SmolLMError):
    """Too many updates were not finite, or the parameters are no longer finite."""

    exit_code = 7


class PeerError(SmolLMError):
    """Another process of a distributed run is gone or could not be reached."""

    exit_code = 8


class StoppedError(SmolLMError):
    """A signal stopped the run after a save: not a failure, the run can be resumed (sysexits.h, EX_TEMPFAIL)."""

    exit_code = 75


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 80, 80


def short_repr(value: Any) -> str:
    """`repr` of any value for an error message: one printable line of at most 120 characters."""
    try:
        return " ".join(_REPR.repr(value).split())[:120]
    except ValueError:  # Python refuses to print an integer of more than 4,300 digits
        return f"{type(value).__name__} of thousands of digits"
