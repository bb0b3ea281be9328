"""The one door to checkpoints on disk: Orbax's `CheckpointManager`, of which no type leaves this file.

A checkpoint is a set of named items ("params", "optimizer"), each a flat dict of arrays, and a small JSON `meta`.
It knows trees and names, not models, so that `weights.py` can read it too.
"""

import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from smollm_jax.errors import CheckpointError, StorageError

Arrays = dict[str, Any]


def flatten(tree: Any) -> Arrays:
    """The tree's arrays by dotted path, "layers.mlp.up_proj": the names checkpoints and weight rules use."""
    import jax

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): leaf for path, leaf in leaves}


def unflatten(like: Any, arrays: Arrays) -> Any:
    """A tree of `like`'s structure with the arrays of the same names; `CheckpointError` names each that differs.

    `like` may hold abstract leaves (`jax.eval_shape`). Shapes must agree; dtypes are the arrays' own.
    """
    import jax

    expected = flatten(like)
    faults = [f"{name} is missing" for name in expected if name not in arrays]
    faults += [f"{name} is not expected" for name in arrays if name not in expected]
    for name in expected.keys() & arrays.keys():
        if expected[name].shape != arrays[name].shape:
            faults.append(f"{name} has shape {arrays[name].shape}, expected {expected[name].shape}")
    if faults:
        raise CheckpointError("; ".join(sorted(faults)))
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[_name(path)], like)


def _name(path: Any) -> str:
    import jax

    # An nnx.Param is a node with one child, "value", which says nothing.
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def steps_in(run: Path) -> list[int]:
    """The steps a run folder holds whole, oldest first, without opening them; an unfinished save does not count."""
    return sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit())


class CheckpointStore:
    """Saves and restores numbered steps under one folder, synchronously; keeps the newest `keep`."""

    def __init__(self, folder: Path, *, keep: int | None = None, create: bool = True):
        import orbax.checkpoint as ocp  # 1.8 s to import

        self.folder = folder.absolute()
        if not create and not self.folder.is_dir():
            raise CheckpointError(f"{folder}: no such checkpoint folder")
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates each call at INFO and WARNING
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=create, enable_async_checkpointing=False, cleanup_tmp_directories=create
        )
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps on disk, oldest first."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int:
        """The newest step; raises `CheckpointError` when there is none."""
        if not self.steps():
            raise CheckpointError(f"{self.folder}: holds no checkpoint")
        return self.steps()[-1]

    def save(self, step: int, items: dict[str, Arrays], meta: dict[str, Any]) -> None:
        """Writes a step whole or not at all; raises `StorageError` if it cannot, or if the step is not newer."""
        if self.steps() and step <= self.steps()[-1]:
            raise StorageError(f"{self.folder}: step {step} is not newer than step {self.steps()[-1]} on disk")
        arguments = {name: self._ocp.args.PyTreeSave(arrays) for name, arrays in items.items()}
        try:
            saved = self._manager.save(
                step, args=self._ocp.args.Composite(**arguments, meta=self._ocp.args.JsonSave(meta))
            )
        except (OSError, ValueError) as error:
            raise StorageError(f"{self.folder}: step {step} could not be saved: {error}") from error
        if not saved:
            raise StorageError(f"{self.folder}: Orbax did not save step {step}")

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON saved with a step."""
        return self._restore(step, meta=self._ocp.args.JsonRestore())["meta"]

    def restore(self, step: int, like: dict[str, Arrays]) -> dict[str, Arrays]:
        """Items of a step as `like` (abstract arrays by name) describes them, on this process's default device.

        Raises `CheckpointError` naming every array whose name, shape or dtype differs: Orbax itself casts a dtype
        mismatch in silence, even to int8.
        """
        for item, arrays in like.items():
            self._check(step, item, arrays)
        arguments = {item: self._ocp.checkpoint_utils.construct_restore_args(arrays) for item, arrays in like.items()}
        restores = {item: self._ocp.args.PyTreeRestore(restore_args=args) for item, args in arguments.items()}
        return self._restore(step, **restores)

    def read(self, step: int, item: str) -> dict[str, np.ndarray]:
        """One item of a step as NumPy arrays at their stored precision, whatever devices saved it."""
        import jax

        stored = self._stored(step, item)
        arguments = jax.tree.map(lambda _: self._ocp.RestoreArgs(restore_type=np.ndarray), stored)
        restore = self._ocp.args.PyTreeRestore(restore_args=arguments)
        return self._restore(step, **{item: restore})[item]

    def _restore(self, step: int, **arguments: Any) -> Any:
        if step not in self.steps():
            raise CheckpointError(f"{self.folder}: has no step {step}, only {self.steps()}")
        try:
            return self._manager.restore(step, args=self._ocp.args.Composite(**arguments))
        except Exception as error:  # tensorstore, json and the file system each raise their own
            raise CheckpointError(
                f"{self.folder}: step {step} cannot be restored; move {self.folder / str(step)} away to go on from an "
                f"older step: {error}"
            ) from error

    def _stored(self, step: int, item: str) -> dict[str, Any]:
        if step not in self.steps():
            raise CheckpointError(f"{self.folder}: has no step {step}, only {self.steps()}")
        folder = self.folder / str(step) / item
        try:
            with self._ocp.PyTreeCheckpointer() as reader:
                return dict(reader.metadata(folder).item_metadata.tree)
        except Exception as error:
            raise CheckpointError(f"{folder}: holds no readable arrays: {error}") from error

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
            raise CheckpointError(f"{self.folder}: step {step}, {item}: " + "; ".join(sorted(faults)))
