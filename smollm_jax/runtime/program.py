"""Runs a script's main function: an expected error becomes one line and its documented exit code."""

import contextlib
import os
import re
import sys
from collections.abc import Callable

from smollm_jax.errors import SmolLMError, StoppedError, StorageError, UsageError
from smollm_jax.runtime import install, streams
from smollm_jax.runtime.invocation import as_typed

READER_GONE = 141  # 128 + SIGPIPE


def run_main(main: Callable[[], None]) -> None:
    """Exits with `main`'s documented code; an expected error becomes one line, `--debug` keeps the traceback."""
    streams.prepare()
    try:
        _run_and_flush(main)
    except streams.OutputError as error:
        _leave(
            None if error.reader_gone else f"error: {error}",
            READER_GONE if error.reader_gone else StorageError.exit_code,
        )
    except StoppedError as error:
        _leave(error, error.exit_code)
    except (SmolLMError, OSError, RuntimeError, AssertionError, ValueError) as error:  # Unicode's are ValueErrors
        expected = _expected(error)
        if expected is None or "--debug" in sys.argv:
            raise
        _leave(f"error: {as_typed(str(expected))}", getattr(expected, "exit_code", StorageError.exit_code))
    except KeyboardInterrupt:
        sys.exit(130)


def _run_and_flush(main: Callable[[], None]) -> None:
    try:
        main()
    except SystemExit:  # of --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _leave(message: object | None, code: int) -> None:
    if message is not None:
        print(message, file=sys.stderr)
    with contextlib.suppress(streams.OutputError):
        sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: after a failed save, threads of the libraries underneath may never end.
    os._exit(code)


def _expected(error: Exception) -> Exception | None:
    """The error to show in one line; None for a bug. What a user causes, other libraries raise as unspecific kinds."""
    if isinstance(error, OSError) and not isinstance(error, SmolLMError):
        # A file is written under another name before it gets its own, the only one its user knows.
        return StorageError(re.sub(r"\.([^/]+)\.[0-9a-f]{8}\.tmp\b", r"\1", str(error)))
    if isinstance(error, SmolLMError):
        return error
    if isinstance(error, UnicodeEncodeError):
        names = sys.getfilesystemencoding()
        if error.encoding.replace("latin-1", "iso8859-1") != names or names == "utf-8":
            return None
        name = ascii(error.object)
        return UsageError(f"{name}: no file name in this locale, whose encoding is {names}: set LC_ALL=C.UTF-8")
    return _wrong_setting(error) if isinstance(error, ValueError) else _no_device()


def _wrong_setting(error: ValueError) -> UsageError | None:
    """What to say when JAX, as it is imported, reads a setting in the environment that it cannot understand."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else trace.tb_frame.f_globals.get("__name__")
    if module != "jax._src.config" or hasattr(sys.modules.get("jax"), "devices"):  # else: a bug of a call
        return None
    names = [name for name in os.environ if name.startswith("JAX_") and name.lower() in str(error).lower()]
    return UsageError(f"{'environment variable ' if names else ''}{', '.join(names) or 'JAX'}: {error}")


def _no_device() -> UsageError | None:
    """What to say when JAX was imported and cannot start, for which it raises RuntimeError or a bare AssertionError."""
    jax = sys.modules.get("jax")
    try:
        if jax is not None and hasattr(jax, "devices"):  # else its import failed
            jax.devices()  # at once when it has started; raises again when it has not
        return None
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split("(set JAX_PLATFORMS")[0].split())
    asked = next((name for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME") if os.environ.get(name)), None)
    if asked is None:
        return UsageError(f"JAX finds no device to compute on: {reason}; JAX_PLATFORMS=cpu takes the CPU")
    why = f" ({reason[:200]})" if reason else ""
    return UsageError(
        f"{asked}={os.environ[asked]}: JAX finds no such device here{why}; unset it to take what there is; "
        f"an NVIDIA GPU needs the extra: {install.command('cuda13')}"
    )
