"""The manifest of a checkpoint, `integrity.json`: the size and sha256 of every file. Imports no framework.

Neither Orbax nor tensorstore verifies what it reads: an array file with a flipped bit restores as a wrong weight.
"""

import fnmatch
import functools
import hashlib
import json
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from smollm_jax.errors import CheckpointError, StorageError
from smollm_jax.runtime.atomic import sync

MANIFEST = "integrity.json"
FORMAT = "smollm-integrity-1"
MAX_BYTES = 64 << 20  # of a manifest; a file adds about 150
# Files and folders that other programs create, in lower case: when a user views a folder (macOS, Windows, KDE,
# Synology, Jupyter), edits in it (vim, Emacs), synchronises it (Dropbox, Syncthing, macOS zip), or removes an open
# file in it (NFS, FUSE, trash). Orbax writes no file with such a name.
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
    """A checkpoint differs from what was written. Not for one that cannot be read now, or not by this version."""


class NoManifestError(DamagedError):
    """The folder has no manifest: it was never sealed, or the manifest was deleted."""


def seal(folder: Path, metadata: dict[str, Any]) -> None:
    """Syncs every file under `folder` to disk, then writes the manifest atomically, with `metadata` in it."""
    files, _ = _files(folder)
    with ThreadPoolExecutor() as pool:
        entries = dict(zip(files, pool.map(_size_and_digest, files.values()), strict=True))
    for path in files.values():
        sync(path)
    content = {"format": FORMAT} | metadata | {"files": entries}
    temporary = folder / f"{MANIFEST}.tmp"
    with temporary.open("wb") as file:
        file.write(_serialize(content))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / MANIFEST)
    for directory in [path for path in folder.rglob("*") if path.is_dir()] + [folder]:
        sync(directory)


def verify(folder: Path, items: tuple[str, ...] = ()) -> dict[str, Any]:
    """The manifest, after checking every file against it; `DamagedError` names the first file that differs.

    Files of other programs (`STRAYS`) are not damage; a note on stderr, printed once, says that they are ignored. With
    `items`, only files at the top level and in these subfolders are hashed; of all files existence and size are
    checked. A file that cannot be read may be intact: `StorageError`.
    """
    manifest = _read(folder)
    try:
        present, strays = _files(folder)
        # A manifest may list stray files that were in the folder when it was sealed.
        expected = {name: entry for name, entry in manifest["files"].items() if not is_stray(name)}
        for name in sorted(expected.keys() - present.keys()):  # before the folder that a missing file leaves empty
            raise DamagedError(f"{folder / name}: is missing")
        for name in sorted(present):
            if name not in expected:
                raise DamagedError(f"{folder / name}: is not in {MANIFEST}")
            status = present[name].stat()
            if not stat.S_ISREG(status.st_mode):
                raise DamagedError(f"{folder / name}: is not a file")
            if status.st_size != expected[name][0]:
                raise DamagedError(f"{folder / name}: has {status.st_size} bytes, not {expected[name][0]}")
        hashed = [name for name in present if not items or "/" not in name or name.split("/")[0] in items]
        with ThreadPoolExecutor() as pool:
            entries = pool.map(_size_and_digest, [present[name] for name in hashed])
            for name, entry in zip(hashed, entries, strict=True):
                if entry != expected[name]:
                    raise DamagedError(f"{folder / name}: sha256 differs from {MANIFEST}")
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read: {error}") from error
    if strays:
        more = f" and {len(strays) - 5} more" if len(strays) > 5 else ""
        _print_once(f"note: {folder}: ignoring files of other programs: {', '.join(strays[:5])}{more}")
    return manifest


def is_stray(name: str) -> bool:
    """Whether a path relative to a checkpoint is, or is inside, a file or folder of another program (`STRAYS`)."""
    return any(fnmatch.fnmatchcase(part.lower(), pattern) for part in name.split("/") for pattern in STRAYS)


@functools.cache
def _print_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The files and empty folders of a checkpoint by relative path, without its manifest; and the stray files' paths.

    A save leaves no empty folder, so a manifest lists none.
    """
    paths = (path for path in sorted(folder.rglob("*")) if not path.is_dir() or not any(path.iterdir()))
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    strays = [name for name in files if is_stray(name)]
    return {name: path for name, path in files.items() if name != MANIFEST and name not in strays}, strays


def _size_and_digest(path: Path) -> list[Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), digest]


def _serialize(content: dict[str, Any]) -> bytes:
    """The canonical bytes of a manifest with its own sha256: any other bytes mean that it was changed."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps(content | {"sha256": digest}, sort_keys=True, indent=1) + "\n").encode()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise DamagedError(f"{path}: is not a file of at most {MAX_BYTES:,} bytes")
        written = path.read_bytes()
        content = json.loads(written)
        del content["sha256"]
        intact = _serialize(content) == written and content["format"] == FORMAT
        valid = _is_valid(content)
    except FileNotFoundError as error:
        raise NoManifestError(f"{path}: is missing") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedError(f"{path}: has changed since it was written: {error!r}") from error
    if not intact:
        raise DamagedError(f"{path}: has changed since it was written")
    if not valid:  # signed again after a change
        raise DamagedError(f"{path}: is not a manifest of {FORMAT}: it lacks a field, or one is unknown or invalid")
    return content


def _is_valid(content: dict[str, Any]) -> bool:
    """Whether a manifest has the fields that `seal` writes, and no others."""
    names, files = {"format", "step", "fingerprints", "environment", "files"}, content.get("files")
    objects = (content.get(name, {}) for name in ("fingerprints", "environment"))
    return (
        content.keys() <= names
        and type(content.get("step")) is int
        and all(isinstance(value, dict) for value in objects)
        and isinstance(files, dict)
        and all(
            isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int and isinstance(entry[1], str)
            for entry in files.values()
        )
    )
