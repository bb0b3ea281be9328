"""The C library's heap of a trainer on a CPU: what a step frees is kept for the next one.

By default glibc gives a step's buffers back to the system, which hands them out anew page by page, each cleared and
mapped: at 256 tokens up to a fifth of a step. For scripts to call, never on import: the whole process changes.
"""

import ctypes
import os
from pathlib import Path
from typing import Any

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # glibc's malloc.h
KEPT = {TRIM_THRESHOLD: -1, MMAP_MAX: 0, ARENA_MAX: 1}  # one heap, which only grows; any one left out undoes it
GLIBC_S_OWN = {TRIM_THRESHOLD: 128 << 10, MMAP_MAX: 65536}
DRIVER = Path("/dev/nvidiactl")  # where an NVIDIA GPU's driver is loaded
_libc: Any = ctypes.CDLL(None)


def keep() -> bool:
    """Keeps what is freed, from now on; False, and nothing changed, where it is not to be.

    That is with another C library, with GLIBC_TUNABLES from the user, and beside a GPU, which has the state, while one
    heap for all threads cannot be undone. Before a process has threads, or each of them brings a heap of its own.
    """
    if "GLIBC_TUNABLES" in os.environ or DRIVER.exists() or not hasattr(_libc, "gnu_get_libc_version"):
        return False
    return all([_libc.mallopt(name, value) for name, value in KEPT.items()])


def give_back() -> None:
    """glibc's own ways again, but for one heap of all threads, and what is free goes back to the system."""
    for name, value in GLIBC_S_OWN.items():
        _libc.mallopt(name, value)
    _libc.malloc_trim(0)
