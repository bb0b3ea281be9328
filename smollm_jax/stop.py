"""SIGTERM and SIGINT as a wish to stop, noticed at once and granted at the next safe place."""

import os
import signal
import socket
import sys
import threading

from smollm_jax.errors import StoppedError


class Stop:
    """Whether a signal asked to stop; `listen` starts the asking."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def error(self, where: str) -> StoppedError:
        """What to raise once all is safe; `where` says what was saved."""
        assert self.signal is not None
        return StoppedError(f"stopped by {self.signal.name}: {where}")

    def listen(self) -> "Stop":
        """Takes both signals over. Call from the main thread, before anything long.

        A Python handler runs only between two bytecodes of the main thread, so not while XLA compiles: the
        interpreter's wakeup file tells a thread of ours at once, and that thread can end the process.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writer.fileno())
        self._sockets = (reader, writer)  # closed with the process, not before
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def _watch(self) -> None:
        while received := self._sockets[0].recv(1):
            number = signal.Signals(received[0])
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            if self.signal is not None:
                os._exit(128 + number)  # an unfinished save is in a folder of its own, which the next start removes
            self.signal = number
            print(
                f"{number.name}: stopping after this step and a save; once more: at once", file=sys.stderr, flush=True
            )
