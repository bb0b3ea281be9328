"""glibc's malloc settings for training on a CPU: freed buffers are reused instead of returned to the system.

By default glibc returns a step's large buffers to the kernel, and the next step faults them in again page by page:
up to a fifth of the step time at 256 tokens. The settings apply to the whole process, so scripts call this, and no
module does on import.
"""

import ctypes
import os
from pathlib import Path
from typing import Any

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # glibc's malloc.h
RETAIN = {TRIM_THRESHOLD: -1, MMAP_MAX: 0, ARENA_MAX: 1}  # one heap that only grows; all three are needed
DEFAULTS = {TRIM_THRESHOLD: 128 << 10, MMAP_MAX: 65536}
DRIVER = Path("/dev/nvidiactl")  # exists where an NVIDIA driver is loaded
_libc: Any = ctypes.CDLL(None)


def retain_freed_memory() -> bool:
    """Makes malloc retain freed memory; returns False, and changes nothing, where that is not wanted.

    That is with another C library, where the user sets GLIBC_TUNABLES, and with a GPU: the state is on the GPU, and
    M_ARENA_MAX cannot be reverted. Call before the first thread starts, because each thread gets its own arena.
    """
    if "GLIBC_TUNABLES" in os.environ or DRIVER.exists() or not hasattr(_libc, "gnu_get_libc_version"):
        return False
    return all([_libc.mallopt(name, value) for name, value in RETAIN.items()])


def restore_defaults() -> None:
    """Restores glibc's defaults, except for M_ARENA_MAX, and returns free memory to the system."""
    for name, value in DEFAULTS.items():
        _libc.mallopt(name, value)
    _libc.malloc_trim(0)
