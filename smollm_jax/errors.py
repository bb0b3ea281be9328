"""The errors a user can cause, each with its exit code; `runtime/program.py` prints one as one line.

Exit codes of every script: 0 finished, 1 bug, 2 usage or config, 3 bad input file, 4 no usable checkpoint,
5 storage, 6 locked by another trainer or preparation, 7 diverged, 8 another process of the run has gone, 75 stopped by
a signal after a verified save, 128 + n ended at once by signal n (a second one, or one before the trainer listens).

A closed stdin, stdout or stderr counts as /dev/null and changes no code, and neither does a stderr that cannot be
written. A full stdout is 5; one whose reader has gone (`| head -1`) ends the script without a word with 141, as SIGPIPE
does. The trainers and prepare_data.py go on without their stdout: what they are asked for is a file.
"""

import reprlib
from typing import Any


class SmolLMError(ValueError):
    """Base of the errors below: the message is one line that names the file, tensor, field or step."""

    exit_code = 1


class UsageError(SmolLMError):
    """A flag, a config field or a combination of them that cannot be honoured."""

    exit_code = 2


class InputFileError(SmolLMError):
    """A file that was given to us is missing, malformed or not what its name says."""

    exit_code = 3


class CheckpointError(SmolLMError):
    """No checkpoint of the run can be used."""

    exit_code = 4


class StorageError(SmolLMError):
    """Something could not be written."""

    exit_code = 5


class LockedError(SmolLMError):
    """Another trainer has the run folder, or another preparation the data set."""

    exit_code = 6


class DivergedError(SmolLMError):
    """Too many updates were not finite, or the parameters are not."""

    exit_code = 7


class PeerError(SmolLMError):
    """Another process of a run of several has gone or could not be reached."""

    exit_code = 8


class StoppedError(SmolLMError):
    """A signal asked to stop, and everything is saved: not a fault, and to be resumed (sysexits.h, EX_TEMPFAIL)."""

    exit_code = 75


_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother = 2, 80, 80


def shown(value: Any) -> str:
    """A foreign value for a message: one printable line of bounded length, whatever the value is."""
    try:
        return " ".join(_SHOWN.repr(value).split())[:120]
    except ValueError:  # Python writes no integer of over 4,300 digits
        return f"{type(value).__name__} of thousands of digits"
