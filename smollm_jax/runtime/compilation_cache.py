"""Compiled programs kept from one start to the next, in a folder that is the user's alone.

Whoever can write such a folder can run code here, so one that others can write is not used.
"""

import hashlib
import os
import platform
import stat
from pathlib import Path

from smollm_jax.errors import UsageError


def folder() -> Path:
    """Where: `$XDG_CACHE_HOME/smollm-jax/compiled/<kind of CPU>`, by default under `~/.cache`.

    By the CPU's features, because a home may be shared: JAX's keys leave them out, and a program for another CPU
    ends in an illegal instruction.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    kind = hashlib.sha256(" ".join(sorted(features.split())).encode()).hexdigest()[:12]
    return home / "smollm-jax" / "compiled" / f"{platform.machine()}-{kind}"


def enable() -> None:
    """Turns JAX's persistent cache on, for small programs too. Call before the first compilation.

    `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` turns it off. Raises
    `UsageError` for a folder of ours that others can write.
    """
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    path = folder()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return  # no home to write in: everything works, and starts as slowly as the first time
    about = path.stat()
    if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(f"{path}: others can write compiled programs there; chmod 700, or remove it")
    remove_broken(path)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def remove_broken(path: Path) -> None:
    """Removes entries that a killed process left half written; only what is new since the last time is looked at.

    JAX would warn of one at every start and never replace it: it writes entries in place, and not over another.
    """
    from jax._src.compilation_cache import decompress_executable  # zstd or zlib, as installed: both have checksums

    mark = path / "checked"
    since = mark.stat().st_mtime if mark.exists() else 0.0
    mark.touch()
    for entry in path.glob("*-cache"):
        if entry.stat().st_mtime >= since - 1:
            try:
                decompress_executable(entry.read_bytes())
            except Exception:  # zlib's or zstd's own
                entry.unlink(missing_ok=True)
