"""The errors a user can cause, each with its exit code, and the wrapper that prints one as one line.

Exit codes of every script: 0 finished, 1 bug, 2 usage or config, 3 bad input file, 4 no usable checkpoint,
5 storage, 6 locked by another trainer or preparation, 7 diverged, 8 another process of the run has gone, 75 stopped by
a signal after a verified save, 128 + n ended at once by signal n (a second one, or one before the trainer listens).
tyro too uses 2 for a wrong flag.
"""

import os
import sys
from collections.abc import Callable


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
    """Another trainer is at work in the run folder."""

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


def run(main: Callable[[], None]) -> None:
    """Exits with `main`'s documented code; an expected error becomes one line, `--debug` keeps the traceback."""
    try:
        main()
    except (SmolLMError, OSError) as error:
        stopped = isinstance(error, StoppedError)
        if "--debug" in sys.argv and not stopped:
            raise
        print(error if stopped else f"error: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: after a failed save, threads of the libraries underneath may never end.
        os._exit(error.exit_code if isinstance(error, SmolLMError) else StorageError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
