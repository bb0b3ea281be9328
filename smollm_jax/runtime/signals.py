"""SIGTERM, SIGINT and SIGHUP as a wish to stop, noticed at once and granted at the next safe place."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time

from smollm_jax.errors import StoppedError
from smollm_jax.runtime.streams import lasting

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Seconds in which more signals say the same: `timeout` sends its own to the process and to its group, and a terminal's
# Ctrl-C reaches a script and the launcher that passes it on.
ONE_WISH = 1.0


class Stop:
    """Whether a signal asked to stop; `listen` starts the asking."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def request(self, number: int) -> None:
        """Asks to stop, as a signal does; the first one counts."""
        if self.signal is None:
            self.signal = signal.Signals(number)

    def error(self, where: str) -> StoppedError:
        """What to raise once all is safe; `where` says what was saved."""
        assert self.signal is not None
        return StoppedError(f"stopped by {self.signal.name}: {where}")

    def listen(self, doing: str = "stopping after this step and a save") -> "Stop":
        """Takes the signals over, and makes the output outlive its reader. Call first, from the main thread.

        A Python handler runs only between two bytecodes of the main thread: before its next step, then, but not while
        XLA compiles. The interpreter's wakeup file tells a thread of ours meanwhile, as soon as that thread gets its
        turn, which may be steps later on a busy machine: it answers the sender, and ends the process if asked again
        `ONE_WISH` seconds later.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, lambda number, _: self.request(number))
        signal.set_wakeup_fd(writer.fileno())
        self._doing = doing
        self._sockets = (reader, writer)  # closed with the process, not before
        threading.Thread(target=self._watch, daemon=True).start()
        sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
        return self

    @staticmethod
    def ignore() -> None:
        """Deaf from here on: nothing is left to save, and Python's own exit gives signals their default back."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _watch(self) -> None:
        number = self._next_signal()
        self.request(number)
        print(f"{number.name}: {self._doing}; again after a second: at once", file=sys.stderr, flush=True)
        time.sleep(ONE_WISH)
        with contextlib.suppress(BlockingIOError):
            self._sockets[0].recv(65536, socket.MSG_DONTWAIT)
        # An unfinished save is in a folder of its own, which the next start removes.
        os._exit(128 + self._next_signal())

    def _next_signal(self) -> signal.Signals:
        while (number := signal.Signals(self._sockets[0].recv(1)[0])) not in SIGNALS:
            pass
        return number
