"""The one door to checkpoints on disk: Orbax writes and reads the arrays, and no type of its leaves this file.

A checkpoint is a set of named items ("params", "optimizer"), each a flat dict of arrays, and a small JSON `meta`.
It knows trees and names, not models, so that `weights` can read it too.
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

from smollm_jax.errors import CheckpointError, DivergedError, PeerError, StorageError
from smollm_jax.runs import manifest
from smollm_jax.runs.manifest import DamagedError, NoManifestError
from smollm_jax.runs.pytree import Arrays
from smollm_jax.runtime.atomic import sync

T = TypeVar("T")
STAGING = ".saving"
LATE_WRITES = 0.5  # seconds without one after which a failed save's threads count as done


def steps_in(checkpoints: Path) -> list[int]:
    """The steps a folder of checkpoints holds whole, oldest first, without opening them."""
    return sorted(int(path.name) for path in checkpoints.glob("*") if re.fullmatch("0|[1-9][0-9]*", path.name))


class CheckpointStore:
    """Saves and restores numbered steps under one folder; keeps the newest `keep`.

    A step is written under `.saving/`, sealed with a manifest of every file's sha256 (`manifest.py`), and then moved
    to its place by one rename: a step with a number for a name is whole, whenever the process died. So Orbax's
    `CheckpointManager`, which would commit first, is not between. Whoever writes must be the only one (`lock.py`).
    """

    def __init__(self, folder: Path, *, keep: int | None = None, create: bool = True, asynchronous: bool = False):
        import orbax.checkpoint as ocp  # 1.8 s to import

        self.folder = folder.absolute()
        self._staging = self.folder / STAGING
        if create:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._staging.exists() and self._first():  # a save that was cut off, or what it was about to remove
                shutil.rmtree(self._staging)
        elif not self.folder.is_dir():
            raise CheckpointError(f"{folder}: no such checkpoint folder")
        _hush()
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
        """The newest step, verified or not; raises `CheckpointError` when there is none."""
        if not self.steps():
            raise CheckpointError(f"{self.folder}: holds no checkpoint")
        return self.steps()[-1]

    def save(self, step: int, items: dict[str, Arrays], meta: dict[str, Any]) -> None:
        """Writes a step whole or not at all, and only then removes the steps beyond `keep`.

        Raises `StorageError` if it cannot or if the step is not newer, `DivergedError` if a number is not finite. An
        asynchronous store copies the arrays and returns; what goes wrong is raised by the next `save` or `wait`.
        `meta["fingerprints"]` and `meta["environment"]` go into the manifest too.
        """
        import jax
        import jax.numpy as jnp

        self.wait()
        if self.steps() and step <= self.steps()[-1]:
            raise StorageError(f"{self.folder}: step {step} is not newer than step {self.steps()[-1]} on disk")
        if names := not_finite(items):
            raise DivergedError(f"step {step}: {names[0]} is not finite: not saved; the steps before it are intact")
        if not self.asynchronous:
            self._write(step, items, meta)
        else:  # the next step donates, and so overwrites, what we were given
            self._pending = self._background.submit(self._write, step, jax.tree.map(jnp.copy, items), meta)

    def wait(self) -> None:
        """Returns when no save is under way; raises what the last one ran into."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, items: dict[str, Arrays], meta: dict[str, Any]) -> None:
        from smollm_jax.parallel import processes

        save, folder = self._ocp.args, self._staging / str(step)
        # Files of 64 MiB, so that they are hashed on all cores.
        arguments = {
            name: save.PyTreeSave(arrays, ocdbt_target_data_file_size=64 << 20) for name, arrays in items.items()
        }
        about = {"step": step} | {name: meta.get(name, {}) for name in ("fingerprints", "environment")}
        quiet = LATE_WRITES
        try:
            with processes.translate_peer_errors():
                self._staging.mkdir(exist_ok=True)
                self._orbax.save(folder, args=save.Composite(**arguments, meta=save.JsonSave(meta)))
                if processes.is_main_process():
                    self._commit(step, folder, about)
                processes.barrier(f"step {step} is committed")
            quiet = 0
        except PeerError:
            raise
        except Exception as error:  # Orbax, tensorstore and the file system each raise their own
            raise StorageError(f"{self.folder}: step {step} could not be saved: {_first_line(error)}") from error
        finally:
            if processes.is_main_process():
                self._clear(quiet)

    def _commit(self, step: int, folder: Path, about: dict[str, Any]) -> None:
        manifest.seal(folder, about)
        folder.rename(self.folder / str(step))
        sync(self.folder)
        for old in self.steps()[: -self._keep] if self._keep else []:
            (self.folder / str(old)).rename(self._staging / f"{old}.removed")

    def _clear(self, quiet: float) -> None:
        """Removes the staging folder, again where a failed save's threads make it again, until it is away for `quiet`
        seconds; for ten at most, and for one where nothing failed."""
        away = time.monotonic()
        end = away + (10 if quiet else 1)
        while time.monotonic() < end:
            if self._staging.exists():
                shutil.rmtree(self._staging, ignore_errors=True)
                away = time.monotonic()
            if time.monotonic() - away >= quiet and not self._staging.exists():
                return
            time.sleep(0.01)

    def newest(self, load: Callable[[int], T], *, allow_unverified: bool = False) -> T:
        """`load(step)` of the newest step that is not damaged.

        Newer steps, which are, get renamed aside, never deleted, with a warning on stderr. When all are, nothing is
        touched and the `CheckpointError` tells each one's reason. A step that is whole and yet cannot be read now, or
        not by this version, is no reason to go back: that error is raised as it is.
        """
        reasons: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                self.verify(step, allow_unverified=allow_unverified)
                loaded = load(step)
            except DamagedError as error:
                reasons[step] = str(error)
                continue
            self._all_agree(step)
            for bad, reason in reasons.items() if self._first() else ():
                aside = self._set_aside(bad)
                print(f"warning: {reason}; renamed to {aside}, going on from step {step}", file=sys.stderr, flush=True)
            return loaded
        if not reasons:
            raise CheckpointError(f"{self.folder}: holds no checkpoint")
        raise CheckpointError("no step can be used: " + "; ".join(reasons.values()))

    @staticmethod
    def _first() -> bool:
        from smollm_jax.parallel import processes

        return processes.is_main_process()

    def _all_agree(self, step: int) -> None:
        """Raises `CheckpointError` unless every process of the run, reading the same files, found the same step."""
        from smollm_jax.parallel import processes

        if len(steps := processes.all_gather_int(step)) > 1:
            raise CheckpointError(f"{self.folder}: its processes found different steps whole: {sorted(steps)}")

    def _set_aside(self, step: int) -> Path:
        names = [f"{step}.bad", *(f"{step}.bad{number}" for number in range(2, 1000))]
        aside = next(self.folder / name for name in names if not (self.folder / name).exists())
        (self.folder / str(step)).rename(aside)
        return aside

    def verify(self, step: int, *, item: str | None = None, allow_unverified: bool = False) -> dict[str, Any]:
        """The manifest of a step whose every file is as it was written; `CheckpointError` names one that is not.

        `item` limits the reading to the files needed for that item and for `meta`. A step without a manifest is
        refused unless `allow_unverified`, and then its manifest is empty.
        """
        folder = self._folder_of(step)
        try:
            content = manifest.verify(folder, (item, "meta") if item else ())
        except NoManifestError as error:
            if allow_unverified:
                return {}
            raise DamagedError(f"{error}, so nothing vouches for this step; --allow-unverified takes it") from error
        if content["step"] != step:
            raise DamagedError(f"{folder}: was saved as step {content['step']} and renamed")
        return content

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON saved with a step."""
        return self._restore(step, meta=self._ocp.args.JsonRestore())["meta"]

    def restore(self, step: int, like: dict[str, Arrays]) -> dict[str, Arrays]:
        """Items of a step as `like` (abstract arrays by name) describes them, on this process's default device.

        Raises `CheckpointError` naming every array whose name, shape or dtype differs, for Orbax itself casts a dtype
        mismatch in silence, even to int8; and naming one whose numbers are not all finite.
        """
        for item, arrays in like.items():
            self._check(step, item, arrays)
        arguments = {item: self._ocp.checkpoint_utils.construct_restore_args(arrays) for item, arrays in like.items()}
        restores = {item: self._ocp.args.PyTreeRestore(restore_args=args) for item, args in arguments.items()}
        restored = self._restore(step, **restores)
        if names := not_finite(restored):
            raise DamagedError(f"{self.folder}: step {step}: {', '.join(names)}: not finite")
        return restored

    def read(self, step: int, item: str) -> dict[str, np.ndarray]:
        """One item of a step as NumPy arrays at their stored precision, whatever devices saved it."""
        import jax

        stored = self._stored(step, item)
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
        except Exception as error:  # tensorstore, json and the file system each raise their own
            raise CheckpointError(f"{folder}: cannot be restored: {_first_line(error)}") from error

    def _stored(self, step: int, item: str) -> dict[str, Any]:
        folder = self._folder_of(step) / item
        try:
            with self._ocp.PyTreeCheckpointer() as reader:
                return dict(reader.metadata(folder).item_metadata.tree)
        except Exception as error:
            raise CheckpointError(f"{folder}: holds no readable arrays: {_first_line(error)}") from error

    def _check(self, step: int, item: str, like: Arrays) -> None:
        stored = self._stored(step, item)
        faults = [f"{name} is missing" for name in like if name not in stored]
        faults += [f"{name} is not expected" for name in stored if name not in like]
        for name in like.keys() & stored.keys():
            found, wanted = stored[name], like[name]
            if tuple(found.shape) != tuple(wanted.shape) or np.dtype(found.dtype) != np.dtype(wanted.dtype):
                faults.append(
                    f"{name} is {found.dtype}{list(found.shape)}, expected {wanted.dtype}{list(wanted.shape)}"
                )
        if faults:
            raise DamagedError(f"{self.folder}: step {step}, {item}: " + "; ".join(sorted(faults)))


def not_finite(items: dict[str, Arrays]) -> list[str]:
    """The names, "params.norm", of arrays with a NaN or an infinity among them."""
    import jax

    arrays = {f"{item}.{name}": array for item, part in items.items() for name, array in part.items()}
    return [name for name, finite in jax.device_get(jax.jit(_all_finite)(arrays)).items() if not finite]


def _all_finite(arrays: Arrays) -> Arrays:
    import jax.numpy as jnp

    return {name: jnp.isfinite(x).all() for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact)}


def _hush() -> None:
    """What goes wrong is raised here, in one line; Orbax, asyncio and tensorstore's callbacks say it in hundreds."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = lambda args: (
            None if str(args.exc_value) == "Event loop is closed" else sys.__unraisablehook__(args)
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
