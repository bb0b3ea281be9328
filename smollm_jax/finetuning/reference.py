"""A DPO run's reference: the log-probabilities of its answers under the model that it starts from, computed once.

They are kept in the run folder under a fingerprint of weights and data, so that a resumed run reads the same bits.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax.data.examples.packing import PairRows
from smollm_jax.errors import InputFileError, StorageError
from smollm_jax.finetuning.batches import RowBatches
from smollm_jax.finetuning.objectives import answer_log_probs
from smollm_jax.model.smollm import SmolLM
from smollm_jax.runtime.atomic import overwrite
from smollm_jax.runtime.signals import StopSignal
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.weights.safetensors_file import read_safetensors, safetensors_bytes

FILE = "reference.safetensors"
ADAPTER = "reference_adapter"  # the adapter that a run started from, of a run with --init-adapter

log_probs_of = jax.jit(answer_log_probs, static_argnames="execution")


def fingerprint(batches: RowBatches, base_sha256: str, adapter: Path | None, dtype: str) -> str:
    """The sha256 of what decides the numbers: data, weights, the adapter a run starts from, and the dtype."""
    digest = hashlib.sha256(f"{batches.sha256} {base_sha256} {dtype}".encode())
    if adapter is not None:
        for path in sorted(adapter.iterdir()):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def fill(
    batches: RowBatches,
    path: Path,
    identity: str,
    load: Callable[[], SmolLM],
    execution: ExecutionConfig,
    validation_batches: int,
    stop: StopSignal,
) -> None:
    """Fills in the reference of every pair that the run trains on or validates with, from `path` where it has them.

    `load` returns the reference model; it is called if any pair is missing. Raises `StoppedError` after a signal and
    `InputFileError` naming a pair without a finite log-probability.
    """
    needed: dict[str, tuple[Any, np.ndarray]] = {  # the pairs, which are `PairRows`, and the numbers of those needed
        "train": (batches.train, batches.met()),
        "held_out": (batches.held_out, batches.validation_numbers(validation_batches)),
    }
    _read(path, identity, {name: rows.reference for name, (rows, _) in needed.items()})
    missing = {name: numbers[np.isnan(rows.reference[numbers]).any(1)] for name, (rows, numbers) in needed.items()}
    count = sum(map(len, missing.values()))
    if not count:
        return
    print(f"reference   computing the log-probabilities of {count:,} pairs, once", flush=True)
    model = load()
    size = batches.recipe.batch_size // execution.accumulation_steps
    for name, (rows, _) in needed.items():
        _compute(model, rows, missing[name], size, execution, stop)
        if faults := missing[name][~np.isfinite(rows.reference[missing[name]]).all(1)].tolist():
            raise InputFileError(f"{name} pair {faults[0]}: the weights give it no finite log-probability")
    contents = {name: rows.reference for name, (rows, _) in needed.items()}
    try:
        overwrite(path, safetensors_bytes(contents, {"fingerprint": identity}))
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error


def _read(path: Path, identity: str, into: dict[str, np.ndarray]) -> None:
    """Copies the log-probabilities of a file, unless it is missing or of other weights or data."""
    if not path.exists():
        return
    tensors, metadata = read_safetensors(path)
    if metadata.get("fingerprint") != identity:
        return
    for name, reference in into.items():
        if tensors[name].shape != reference.shape:
            raise InputFileError(f"{path}: {name} has shape {list(tensors[name].shape)}: delete the file, and resume")
        reference[...] = tensors[name]


def _compute(
    model: SmolLM, rows: PairRows, numbers: np.ndarray, size: int, execution: ExecutionConfig, stop: StopSignal
) -> None:
    for start in range(0, len(numbers), size):
        if stop:
            raise stop.error("the reference's log-probabilities were not complete, nothing is saved: start again")
        chosen = numbers[start : start + size]
        batch = rows[np.resize(chosen, size)].arrays()  # the last batch repeats pairs: one shape, one program
        batch = {name: jnp.asarray(array) for name, array in batch.items()}
        rows.reference[chosen] = np.asarray(log_probs_of(model, batch, execution=execution))[: len(chosen)]
