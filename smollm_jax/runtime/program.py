"""Runs a script's main function and turns expected errors into one line and a documented exit code."""

import contextlib
import os
import re
import sys
from collections.abc import Callable

from smollm_jax.errors import SmolLMError, StoppedError, StorageError, UsageError
from smollm_jax.runtime import install, streams
from smollm_jax.runtime.invocation import as_typed

BROKEN_PIPE = 141  # 128 + SIGPIPE


def run_main(main: Callable[[], None]) -> None:
    """Calls `main`; an error that a user can cause becomes one line and an exit code, `--debug` shows the traceback."""
    streams.prepare()
    try:
        _run_and_flush(main)
    except streams.OutputError as error:
        _exit(
            None if error.reader_gone else f"error: {error}",
            BROKEN_PIPE if error.reader_gone else StorageError.exit_code,
        )
    except StoppedError as error:
        _exit(error, error.exit_code)
    except (SmolLMError, OSError, RuntimeError, AssertionError, ValueError) as error:  # UnicodeError is a ValueError
        user_error = _user_error(error)
        if user_error is None or "--debug" in sys.argv:
            raise
        _exit(f"error: {as_typed(str(user_error))}", user_error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _run_and_flush(main: Callable[[], None]) -> None:
    try:
        main()
    except SystemExit:  # from --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _exit(message: object | None, code: int) -> None:
    if message is not None:
        print(message, file=sys.stderr)
    with contextlib.suppress(streams.OutputError):
        sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit, which joins threads: after a failed save, those of Orbax may never end.
    os._exit(code)


def _user_error(error: Exception) -> SmolLMError | None:
    """The error as one that a user can cause; None for a bug. Recognises what Python and JAX raise in such cases."""
    if isinstance(error, OSError) and not isinstance(error, SmolLMError):
        # Show the name of the target, not that of the temporary file (`atomic.replacing`).
        return StorageError(re.sub(r"\.([^/]+)\.[0-9a-f]{8}\.tmp\b", r"\1", str(error)))
    if isinstance(error, SmolLMError):
        return error
    if isinstance(error, UnicodeEncodeError):
        names = sys.getfilesystemencoding()
        if error.encoding.replace("latin-1", "iso8859-1") != names or names == "utf-8":
            return None
        name = ascii(error.object)
        return UsageError(f"{name}: cannot be a file name in this locale's encoding, {names}: set LC_ALL=C.UTF-8")
    return _invalid_jax_setting(error) if isinstance(error, ValueError) else _no_device()


def _invalid_jax_setting(error: ValueError) -> UsageError | None:
    """The error for an environment variable with an invalid value, which JAX reads when it is imported."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else trace.tb_frame.f_globals.get("__name__")
    if module != "jax._src.config" or hasattr(sys.modules.get("jax"), "devices"):  # raised by a call, so a bug
        return None
    names = [name for name in os.environ if name.startswith("JAX_") and name.lower() in str(error).lower()]
    return UsageError(f"{'environment variable ' if names else ''}{', '.join(names) or 'JAX'}: {error}")


def _no_device() -> UsageError | None:
    """The error when JAX finds no device; JAX raises RuntimeError or a bare AssertionError then. None for a bug."""
    jax = sys.modules.get("jax")
    try:
        if jax is not None and hasattr(jax, "devices"):  # false when the import of JAX failed
            jax.devices()  # raises again when JAX has no device
        return None
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split("(set JAX_PLATFORMS")[0].split())
    variable = next((name for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME") if os.environ.get(name)), None)
    if variable is None:
        return UsageError(f"JAX finds no device to compute on: {reason}; set JAX_PLATFORMS=cpu to use the CPU")
    why = f" ({reason[:200]})" if reason else ""
    return UsageError(
        f"{variable}={os.environ[variable]}: JAX finds no such device here{why}; unset it to use the default device, "
        f"or install the extra for NVIDIA GPUs: {install.command('cuda13')}"
    )
