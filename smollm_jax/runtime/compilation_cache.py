"""JAX's persistent compilation cache, in a folder that only the user can write.

Whoever can write to the cache can run code in this process, so a folder that other users can write is refused.
"""

import hashlib
import os
import platform
import stat
from pathlib import Path

from smollm_jax.errors import UsageError


def folder() -> Path:
    """The cache folder: `$XDG_CACHE_HOME/smollm-jax/compiled/<machine>-<hash of CPU features>`, or under `~/.cache`.

    Machines with different CPUs may share a home folder. JAX's cache keys do not include CPU features, and a program
    compiled for another CPU dies of an illegal instruction.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    digest = hashlib.sha256(" ".join(sorted(features.split())).encode()).hexdigest()[:12]
    return cache / "smollm-jax" / "compiled" / f"{platform.machine()}-{digest}"


def enable() -> None:
    """Turns JAX's persistent cache on, for programs of any size. Call before the first compilation.

    `JAX_COMPILATION_CACHE_DIR` selects another folder, `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off.
    Raises `UsageError` when other users can write to the default folder.
    """
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    path = folder()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return  # the home folder is not writable: nothing is cached, and every start compiles
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(f"{path}: other users can write compiled programs here: remove it, or run chmod 700 on it")
    remove_broken(path)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def remove_broken(path: Path) -> None:
    """Removes entries that a killed process left incomplete. Checks only those written since the last call.

    JAX writes entries in place and does not overwrite them, so it would warn of a broken one at every start.
    """
    from jax._src.compilation_cache import decompress_executable  # zstd or zlib; both check a checksum

    marker = path / "checked"
    since = marker.stat().st_mtime if marker.exists() else 0.0
    marker.touch()
    for entry in path.glob("*-cache"):
        if entry.stat().st_mtime >= since - 1:
            try:
                decompress_executable(entry.read_bytes())
            except Exception:  # zlib and zstd each raise their own
                entry.unlink(missing_ok=True)
