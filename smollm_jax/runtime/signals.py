"""SIGTERM, SIGINT and SIGHUP as requests to stop: acknowledged at once, honoured at the next safe point."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time

from smollm_jax.errors import StoppedError
from smollm_jax.runtime.streams import pipe_safe

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Further signals within so many seconds count as the first one: `timeout` signals the process and its group, and a
# terminal's Ctrl-C reaches both a script and the launcher that forwards it.
GRACE_SECONDS = 1.0


class StopSignal:
    """True once a signal has requested a stop; `install` sets up the handlers."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def request(self, number: int) -> None:
        """Requests a stop, as the signal `number` does; later requests change nothing."""
        if self.signal is None:
            self.signal = signal.Signals(number)

    def error(self, where: str) -> StoppedError:
        """The error to raise once everything is saved; `where` says what was saved."""
        assert self.signal is not None
        return StoppedError(f"stopped by {self.signal.name}: {where}")

    def install(self, doing: str = "stopping after this step and a save") -> "StopSignal":
        """Installs the signal handlers and makes stdout and stderr survive a closed pipe. Call from the main thread.

        Python handlers run between bytecodes of the main thread, so not while XLA compiles. `set_wakeup_fd` lets a
        thread acknowledge the signal meanwhile, and end the process on another signal after `GRACE_SECONDS`.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup sets SIGHUP so
                signal.signal(number, lambda number, _: self.request(number))
        signal.set_wakeup_fd(writer.fileno())
        self._doing = doing
        self._sockets = (reader, writer)  # open until the process ends
        threading.Thread(target=self._watch, daemon=True).start()
        sys.stdout, sys.stderr = pipe_safe(sys.stdout), pipe_safe(sys.stderr)
        return self

    @staticmethod
    def ignore() -> None:
        """Ignores signals from here on: everything is saved, and at exit Python restores the default handlers."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _watch(self) -> None:
        number = self._next_signal()
        self.request(number)
        print(
            f"{number.name}: {self._doing}; a second signal, after {GRACE_SECONDS:g} s, exits at once",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(GRACE_SECONDS)
        with contextlib.suppress(BlockingIOError):
            self._sockets[0].recv(65536, socket.MSG_DONTWAIT)
        # An unfinished save is in the staging folder, which the next start removes.
        os._exit(128 + self._next_signal())

    def _next_signal(self) -> signal.Signals:
        while (number := signal.Signals(self._sockets[0].recv(1)[0])) not in SIGNALS:
            pass
        return number
