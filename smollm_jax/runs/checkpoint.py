"""Checkpoints on disk: Orbax writes and reads the arrays, and no other module uses Orbax's types.

A checkpoint is a set of named items ("params", "optimizer"), each a flat dict of arrays, and a small JSON `meta`.
This module knows arrays and their names, not models, so that `weights` can use it too.
"""

import logging
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from smollm_jax.errors import CheckpointError, DivergedError, PeerError, StorageError, short_repr
from smollm_jax.runs import manifest
from smollm_jax.runs.manifest import DamagedError, NoManifestError
from smollm_jax.runs.pytree import Arrays
from smollm_jax.runtime.atomic import sync

T = TypeVar("T")
STAGING = ".saving"
STRAGGLER_SECONDS = 0.5  # after a failed save: its threads count as finished when they wrote nothing for this long


def steps_in(checkpoints: Path) -> list[int]:
    """The complete steps in a folder of checkpoints, oldest first; they are neither opened nor verified.

    A file, and a folder whose name is no number of at most 18 digits (64 bits), is no step.
    """
    names = (path.name for path in checkpoints.glob("*") if path.is_dir())
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,17}", name))


class CheckpointStore:
    """Saves and restores numbered steps under one folder; keeps the newest `keep`.

    A step is written under `.saving/`, sealed with a manifest of every file's sha256 (`manifest.py`), and then renamed
    to its number in one operation: a folder named by a number is a complete step, whenever the process died. Orbax's
    `CheckpointManager` is not used because it would commit a step before the manifest exists. The caller must be the
    only writer (`lock.py`).
    """

    def __init__(self, folder: Path, *, keep: int | None = None, create: bool = True, asynchronous: bool = False):
        import orbax.checkpoint as ocp  # 1.8 s to import

        self.folder = folder.absolute()
        self._staging = self.folder / STAGING
        if create:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._staging.exists() and self._is_main_process():  # left by a save that was interrupted
                shutil.rmtree(self._staging)
        elif not self.folder.is_dir():
            raise CheckpointError(f"{folder}: no such checkpoint folder")
        _silence_orbax()
        self._ocp = ocp
        self._orbax = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        self._keep = keep
        self.asynchronous = asynchronous
        self._background = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._orbax.close()

    def steps(self) -> list[int]:
        """The steps on disk, oldest first."""
        return steps_in(self.folder)

    def latest_step(self) -> int:
        """The newest step, which may be damaged; raises `CheckpointError` when there is none."""
        if not self.steps():
            raise CheckpointError(f"{self.folder}: holds no checkpoint")
        return self.steps()[-1]

    def save(self, step: int, items: dict[str, Arrays], meta: dict[str, Any]) -> None:
        """Writes a step completely or not at all, then removes the oldest steps beyond `keep`.

        Raises `StorageError` if writing fails or if the step is not newer, `DivergedError` if a value is not finite. An
        asynchronous store copies the arrays and returns; the next `save` or `wait` raises its errors.
        `meta["fingerprints"]` and `meta["environment"]` go into the manifest too.
        """
        import jax
        import jax.numpy as jnp

        self.wait()
        if self.steps() and step <= self.steps()[-1]:
            raise StorageError(f"{self.folder}: step {step} is not newer than step {self.steps()[-1]} on disk")
        if names := not_finite(items):
            raise DivergedError(f"step {step}: {names[0]} is not finite: not saved; earlier checkpoints are intact")
        if not self.asynchronous:
            self._write(step, items, meta)
        else:  # a copy, because the next train step donates these arrays and overwrites them
            self._pending = self._background.submit(self._write, step, jax.tree.map(jnp.copy, items), meta)

    def wait(self) -> None:
        """Waits for the save in progress, if any, and raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, items: dict[str, Arrays], meta: dict[str, Any]) -> None:
        from smollm_jax.parallel import processes

        save, folder = self._ocp.args, self._staging / str(step)
        # Several files of 64 MiB can be hashed on all cores.
        arguments = {
            name: save.PyTreeSave(arrays, ocdbt_target_data_file_size=64 << 20) for name, arrays in items.items()
        }
        metadata = {"step": step} | {name: meta.get(name, {}) for name in ("fingerprints", "environment")}
        quiet_seconds = STRAGGLER_SECONDS
        try:
            with processes.translate_peer_errors():
                self._staging.mkdir(exist_ok=True)
                self._orbax.save(folder, args=save.Composite(**arguments, meta=save.JsonSave(meta)))
                if processes.is_main_process():
                    self._commit(step, folder, metadata)
                processes.barrier(f"step {step} is committed")
            quiet_seconds = 0
        except PeerError:
            raise
        except Exception as error:  # Orbax, tensorstore and the file system raise many types
            raise StorageError(f"{self.folder}: step {step} could not be saved: {_first_line(error)}") from error
        finally:
            if processes.is_main_process():
                self._remove_staging(quiet_seconds)

    def _commit(self, step: int, folder: Path, metadata: dict[str, Any]) -> None:
        manifest.seal(folder, metadata)
        folder.rename(self.folder / str(step))
        sync(self.folder)
        for old in self.steps()[: -self._keep] if self._keep else []:
            (self.folder / str(old)).rename(self._staging / f"{old}.removed")

    def _remove_staging(self, quiet_seconds: float) -> None:
        """Removes the staging folder until it stays away for `quiet_seconds`: threads of a failed save may recreate it.

        Gives up after 10 seconds, or after 1 if no save failed.
        """
        removed_at = time.monotonic()
        deadline = removed_at + (10 if quiet_seconds else 1)
        while time.monotonic() < deadline:
            if self._staging.exists():
                shutil.rmtree(self._staging, ignore_errors=True)
                removed_at = time.monotonic()
            if time.monotonic() - removed_at >= quiet_seconds and not self._staging.exists():
                return
            time.sleep(0.01)

    def restore_newest_valid(self, load: Callable[[int], T], *, allow_unverified: bool = False) -> T:
        """`load(step)` for the newest step that is not damaged.

        Newer, damaged steps are renamed, never deleted, with a warning on stderr. If all steps are damaged, none is
        renamed and the `CheckpointError` lists the reasons. If an intact step cannot be loaded, for instance by this
        version, that error is raised: an older step is no substitute for it.
        """
        reasons: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                self.verify(step, allow_unverified=allow_unverified)
                loaded = load(step)
            except DamagedError as error:
                reasons[step] = str(error)
                continue
            self._check_agreement(step)
            for damaged, reason in reasons.items() if self._is_main_process() else ():
                target = self._quarantine(damaged)
                print(f"warning: {reason}; renamed to {target}, resuming from step {step}", file=sys.stderr, flush=True)
            return loaded
        if not reasons:
            raise CheckpointError(f"{self.folder}: holds no checkpoint")
        raise CheckpointError("no checkpoint can be used: " + "; ".join(reasons.values()))

    @staticmethod
    def _is_main_process() -> bool:
        from smollm_jax.parallel import processes

        return processes.is_main_process()

    def _check_agreement(self, step: int) -> None:
        """Raises `CheckpointError` unless all processes of the run selected the same step."""
        from smollm_jax.parallel import processes

        if len(steps := processes.all_gather_int(step)) > 1:
            raise CheckpointError(f"{self.folder}: its processes found different valid steps: {sorted(steps)}")

    def _quarantine(self, step: int) -> Path:
        """Renames a step to the first free name of 4.bad, 4.bad2, ...; returns it."""
        names = [f"{step}.bad", *(f"{step}.bad{number}" for number in range(2, 1000))]
        target = next(self.folder / name for name in names if not (self.folder / name).exists())
        (self.folder / str(step)).rename(target)
        return target

    def verify(self, step: int, *, item: str | None = None, allow_unverified: bool = False) -> dict[str, Any]:
        """The manifest of a step after checking every file against it; `CheckpointError` names a file that differs.

        `item` limits the hashing to the files of that item and of `meta`. A step without a manifest is an error, or
        with `allow_unverified` has an empty manifest.
        """
        folder = self._folder_of(step)
        try:
            content = manifest.verify(folder, (item, "meta") if item else ())
        except NoManifestError as error:
            if allow_unverified:
                return {}
            raise DamagedError(f"{error}, so it cannot be verified; --allow-unverified loads it anyway") from error
        if content["step"] != step:
            raise DamagedError(f"{folder}: was saved as step {content['step']}, but has been renamed")
        return content

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON object saved with a step."""
        meta = self._restore(step, meta=self._ocp.args.JsonRestore())["meta"]
        if not isinstance(meta, dict):
            raise CheckpointError(f"{self._folder_of(step)}: meta is {short_repr(meta)}, not an object")
        return meta

    def restore(self, step: int, like: dict[str, Arrays]) -> dict[str, Arrays]:
        """Items of a step with the names, shapes, dtypes and shardings of `like` (abstract arrays by name).

        Raises `CheckpointError` naming every array whose name, shape or dtype differs, since Orbax itself silently
        casts to the expected dtype, even to int8; and naming each array with a value that is not finite.
        """
        for item, arrays in like.items():
            self._check(step, item, arrays)
        arguments = {item: self._ocp.checkpoint_utils.construct_restore_args(arrays) for item, arrays in like.items()}
        restores = {item: self._ocp.args.PyTreeRestore(restore_args=args) for item, args in arguments.items()}
        restored = self._restore(step, **restores)
        if names := not_finite(restored):
            raise DamagedError(f"{self.folder}: step {step}: {', '.join(names)}: values are not finite")
        return restored

    def read(self, step: int, item: str) -> dict[str, np.ndarray]:
        """One item of a step as NumPy arrays at their stored precision, regardless of the devices that saved it."""
        import jax

        stored = self._array_metadata(step, item)
        arguments = jax.tree.map(lambda _: self._ocp.RestoreArgs(restore_type=np.ndarray), stored)
        restore = self._ocp.args.PyTreeRestore(restore_args=arguments)
        return self._restore(step, **{item: restore})[item]

    def _folder_of(self, step: int) -> Path:
        if step not in self.steps():
            raise CheckpointError(f"{self.folder}: has no step {step}, only {self.steps()}")
        return self.folder / str(step)

    def _restore(self, step: int, **arguments: Any) -> dict[str, Any]:
        folder = self._folder_of(step)
        try:
            return dict(self._orbax.restore(folder, args=self._ocp.args.Composite(**arguments)).items())
        except Exception as error:  # tensorstore, json and the file system raise many types
            raise CheckpointError(f"{folder}: cannot be restored: {_first_line(error)}") from error

    def _array_metadata(self, step: int, item: str) -> dict[str, Any]:
        folder = self._folder_of(step) / item
        try:
            with self._ocp.PyTreeCheckpointer() as reader:
                return dict(reader.metadata(folder).item_metadata.tree)
        except Exception as error:
            raise CheckpointError(f"{folder}: has no readable arrays: {_first_line(error)}") from error

    def _check(self, step: int, item: str, like: Arrays) -> None:
        stored = self._array_metadata(step, item)
        faults = [f"{name} is missing" for name in like if name not in stored]
        faults += [f"{name} is not expected" for name in stored if name not in like]
        for name in like.keys() & stored.keys():
            actual, expected = stored[name], like[name]
            if tuple(actual.shape) != tuple(expected.shape) or np.dtype(actual.dtype) != np.dtype(expected.dtype):
                faults.append(
                    f"{name} is {actual.dtype}{list(actual.shape)}, expected {expected.dtype}{list(expected.shape)}"
                )
        if faults:
            raise DamagedError(f"{self.folder}: step {step}, {item}: " + "; ".join(sorted(faults)))


def not_finite(items: dict[str, Arrays]) -> list[str]:
    """The names, such as "params.norm", of arrays with a NaN or an infinite value."""
    import jax

    arrays = {f"{item}.{name}": array for item, tree in items.items() for name, array in tree.items()}
    return [name for name, finite in jax.device_get(jax.jit(_all_finite)(arrays)).items() if not finite]


def _all_finite(arrays: Arrays) -> Arrays:
    import jax.numpy as jnp

    return {name: jnp.isfinite(x).all() for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact)}


def _silence_orbax() -> None:
    """Turns off the logs of Orbax, asyncio and tensorstore's callbacks, hundreds of lines for an error raised here."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = lambda args: (
            None if str(args.exc_value) == "Event loop is closed" else sys.__unraisablehook__(args)
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
