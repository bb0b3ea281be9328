"""What makes a start quick: no garbage collection, short turns for threads, work done beside imports."""

import concurrent.futures
import gc
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SWITCH_INTERVAL = 1e-4  # seconds a thread waits for Python's lock; Python's own 5e-3 adds up over a start's imports


class QuickStart:
    """Makes what follows quick until `end`: nearly all objects that a start makes stay, so nothing is collected.

    Measured in docs/lab-notes.md, "What helped the start".
    """

    def __init__(self, *, threads: bool = False):
        """`threads`: the start uses threads that do most of their work without Python's lock."""
        self._interval = sys.getswitchinterval()
        gc.disable()
        if threads:
            sys.setswitchinterval(SWITCH_INTERVAL)

    def end(self) -> None:
        """Garbage is collected again, but for what is there now."""
        gc.freeze()
        gc.enable()
        sys.setswitchinterval(self._interval)


def background(work: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Runs `work` in a thread of its own."""
    return concurrent.futures.ThreadPoolExecutor(1).submit(work)
