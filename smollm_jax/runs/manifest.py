"""A folder and its manifest, `integrity.json`: every file's size and sha256. Imports no framework.

Neither Orbax nor tensorstore checks what it reads: a flipped bit in an array file restores as another weight.
"""

import fnmatch
import functools
import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from smollm_jax.errors import CheckpointError, StorageError
from smollm_jax.runtime.atomic import sync

MANIFEST = "integrity.json"
FORMAT = "smollm-integrity-1"
# Files and folders that operating systems and tools leave where somebody looked (macOS, Windows, KDE, Synology,
# Jupyter), edited (vim, Emacs) or synchronised (Dropbox, Syncthing, zip of macOS), or where an open file was removed
# (NFS, FUSE, trash). Nothing that Orbax writes has such a name. In lower case.
STRAYS = (
    ".ds_store",
    "._*",
    ".appledouble",
    ".localized",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    ".directory",
    "@eadir",
    ".nfs*",
    ".fuse_hidden*",
    ".trash*",
    ".spotlight-*",
    ".fseventsd",
    ".temporaryitems",
    "icon\r",
    "__macosx",
    ".ipynb_checkpoints",
    ".*.sw?",
    ".#*",
    "*~",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    ".dropbox*",
    ".syncthing.*",
    ".stfolder",
    ".gitkeep",
    ".gitignore",
)


class DamagedError(CheckpointError):
    """A checkpoint is not what was written, as opposed to one that cannot be read or understood now."""


class NoManifestError(DamagedError):
    """The folder was never sealed, or its manifest is gone."""


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Puts every byte under `folder` on the disk, then writes the manifest: complete, or not there."""
    files, _ = _files(folder)
    with ThreadPoolExecutor() as pool:
        entries = dict(zip(files, pool.map(_size_and_digest, files.values()), strict=True))
    for path in files.values():
        sync(path)
    content = {"format": FORMAT} | about | {"files": entries}
    temporary = folder / f"{MANIFEST}.tmp"
    with temporary.open("wb") as file:
        file.write(_signed(content))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / MANIFEST)
    for directory in [path for path in folder.rglob("*") if path.is_dir()] + [folder]:
        sync(directory)


def verify(folder: Path, parts: tuple[str, ...] = ()) -> dict[str, Any]:
    """The manifest, once every file is what it says; `DamagedError` names the first that is not.

    Files that the operating system left there (`STRAYS`) are no damage: a line on stderr says once that they are
    ignored. With `parts`, only files in these folders and at the top are read; all must be there with the right size.
    A file that cannot be read says nothing of what is in it: `StorageError`.
    """
    manifest = _read(folder)
    try:
        found, strays = _files(folder)
        # A step may have been sealed with strays in it, which have gone since.
        expected = {name: entry for name, entry in manifest["files"].items() if not is_stray(name)}
        for name in sorted(found.keys() | expected.keys()):
            if name not in found:
                raise DamagedError(f"{folder / name}: is missing")
            if name not in expected:
                raise DamagedError(f"{folder / name}: is not in {MANIFEST}")
            if found[name].stat().st_size != expected[name][0]:
                raise DamagedError(f"{folder / name}: has {found[name].stat().st_size} bytes, not {expected[name][0]}")
        wanted = [name for name in found if not parts or "/" not in name or name.split("/")[0] in parts]
        with ThreadPoolExecutor() as pool:
            for name, entry in zip(wanted, pool.map(_size_and_digest, [found[name] for name in wanted]), strict=True):
                if entry != expected[name]:
                    raise DamagedError(f"{folder / name}: sha256 differs from {MANIFEST}")
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read: {error}") from error
    if strays:
        more = f" and {len(strays) - 5} more" if len(strays) > 5 else ""
        _note(f"note: {folder}: no part of the checkpoint, so ignored: {', '.join(strays[:5])}{more}")
    return manifest


def is_stray(name: str) -> bool:
    """Whether a path relative to a checkpoint is, or lies in, what an operating system left there."""
    return any(fnmatch.fnmatchcase(part.lower(), pattern) for part in name.split("/") for pattern in STRAYS)


@functools.cache
def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """What belongs to a checkpoint, without its manifest, by relative path; and the relative paths of strays."""
    paths = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    strays = [name for name in files if is_stray(name)]
    return {name: path for name, path in files.items() if name != MANIFEST and name not in strays}, strays


def _size_and_digest(path: Path) -> list[Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), digest]


def _signed(content: dict[str, Any]) -> bytes:
    """The manifest's one and only spelling, so that any other byte in it shows."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps(content | {"sha256": digest}, sort_keys=True, indent=1) + "\n").encode()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        written = path.read_bytes()
        content = json.loads(written)
        del content["sha256"]
        intact = _signed(content) == written and content["format"] == FORMAT
    except FileNotFoundError as error:
        raise NoManifestError(f"{path}: is missing") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedError(f"{path}: is not as it was written: {error!r}") from error
    if not intact:
        raise DamagedError(f"{path}: is not as it was written")
    return content
