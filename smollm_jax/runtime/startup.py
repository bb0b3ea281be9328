"""Faster start-up: no garbage collection, a short GIL switch interval, and background work during imports."""

import concurrent.futures
import gc
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SWITCH_INTERVAL = 1e-4  # seconds a thread waits for the GIL; Python's 5e-3 adds up over the imports


class QuickStart:
    """Turns garbage collection off until `end`, as nearly all objects created during a start stay alive.

    Measured in docs/lab-notes.md, "What helped the start".
    """

    def __init__(self, *, threads: bool = False):
        """`threads`: shorten the GIL switch interval, for a start with threads that mostly work without the GIL."""
        self._interval = sys.getswitchinterval()
        gc.disable()
        if threads:
            sys.setswitchinterval(SWITCH_INTERVAL)

    def end(self) -> None:
        """Turns collection on again, with the objects that exist now excluded from it."""
        gc.freeze()
        gc.enable()
        sys.setswitchinterval(self._interval)


def background(work: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Starts `work` in a new thread."""
    return concurrent.futures.ThreadPoolExecutor(1).submit(work)
