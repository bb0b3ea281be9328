"""A folder and its manifest, `integrity.json`: every file's size and sha256. Standard library only.

Neither Orbax nor tensorstore checks what it reads: a flipped bit in an array file restores as another weight.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from smollm_jax.errors import CheckpointError

MANIFEST = "integrity.json"
FORMAT = "smollm-integrity-1"


class NoManifestError(CheckpointError):
    """The folder was never sealed, or its manifest is gone."""


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Puts every byte under `folder` on the disk, then writes the manifest: complete, or not there."""
    files = _files(folder)
    with ThreadPoolExecutor() as pool:
        entries = dict(zip(files, pool.map(_size_and_digest, files.values()), strict=True))
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
    """The manifest, once every file is what it says; `CheckpointError` names the first that is not.

    With `parts`, only files in these folders and at the top are read; all must be there with the right size.
    """
    manifest = _read(folder)
    try:
        found, expected = _files(folder), manifest["files"]
        for name in sorted(found.keys() | expected.keys()):
            if name not in found:
                raise CheckpointError(f"{folder / name}: is missing")
            if name not in expected:
                raise CheckpointError(f"{folder / name}: is not in {MANIFEST}")
            if found[name].stat().st_size != expected[name][0]:
                raise CheckpointError(
                    f"{folder / name}: has {found[name].stat().st_size} bytes, not {expected[name][0]}"
                )
        wanted = [name for name in found if not parts or "/" not in name or name.split("/")[0] in parts]
        with ThreadPoolExecutor() as pool:
            for name, entry in zip(wanted, pool.map(_size_and_digest, [found[name] for name in wanted]), strict=True):
                if entry != expected[name]:
                    raise CheckpointError(f"{folder / name}: sha256 differs from {MANIFEST}")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    return manifest


def sync(directory: Path) -> None:
    """Puts a directory's entries, new names and renames among them, on the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path for name, path in files.items() if name != MANIFEST}


def _size_and_digest(path: Path) -> list[Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # costs nothing when the bytes are on the disk already
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
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error!r}") from error
    if not intact:
        raise CheckpointError(f"{path}: is not as it was written")
    return content
