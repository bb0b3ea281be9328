"""Training with several processes: initialization, barriers, and small values that all of them must agree on.

A thin layer over `jax.distributed`. The main process (index 0) writes files, in a folder that all processes see; of
arrays, each process writes its own shards (Orbax).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from smollm_jax.errors import PeerError, SmolLMError, UsageError


def initialize(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes of the run: addresses come from Slurm or MPI, or from the arguments.

    Call before any other use of JAX. Raises `UsageError` when Slurm, MPI and the arguments leave something open, and
    `PeerError` when the other processes do not connect within five minutes. When one process is silent for 100
    seconds, JAX ends all others.
    """
    # JAX's service would install its own SIGTERM handler; `runtime/signals.py` and `SyncedFlag` handle signals here.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"--distributed: {error} Slurm and mpirun need no further flags; elsewhere give --coordinator-address, "
            "--num-processes and --process-id"
        ) from error
    except RuntimeError as error:
        address = coordinator_address or "the coordinator"
        raise PeerError(f"--distributed: {address} could not be reached: {_first_line(error)}") from error


def is_main_process() -> bool:
    """Whether this is the one process that writes files and prints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def translate_peer_errors() -> Iterator[None]:
    """Raises `PeerError` for the errors that JAX raises when another process is gone; other errors pass unchanged."""
    try:
        yield
    except SmolLMError:
        raise
    except (RuntimeError, ValueError) as error:  # JAX raises both
        text = str(error)
        if jax.process_count() == 1 or not any(name in text for name in ("Gloo", "NCCL", "oordination", "DEADLINE")):
            raise
        raise PeerError(
            f"process {jax.process_index()} of {jax.process_count()}: another process of this run is gone; its output "
            f"says why. Restart all processes with --resume ({_first_line(error)})"
        ) from error


class SyncedFlag:
    """A boolean that is true in all processes as soon as it is true in one: the OR of their values.

    Each call returns the OR of the values given to the previous call, so that no process waits for the step that its
    devices are computing. All processes see the same result at the same call.
    """

    def __init__(self) -> None:
        self._pending: Any = None
        if jax.process_count() > 1:
            mesh = jax.make_mesh((jax.device_count(),), ("all",), (AxisType.Auto,))
            self._sharded, replicated = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
            self._any = jax.jit(lambda values: values.any(), out_shardings=replicated)

    def __call__(self, value: bool) -> bool:
        if jax.process_count() == 1:
            return value
        previous = self._pending
        values = jax.make_array_from_callback((jax.device_count(),), self._sharded, lambda _: np.array([value]))
        self._pending = self._any(values)
        return previous is not None and bool(previous)


def barrier(name: str) -> None:
    """Returns when every process has called this with the same `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_gather_int(number: int) -> set[int]:
    """The distinct values of `number` over all processes; every process must call."""
    if jax.process_count() == 1:
        return {number}
    return set(np.asarray(multihost_utils.process_allgather(np.int64(number))).ravel().tolist())


def gather_to_local_device(tree: Any) -> Any:
    """The unsharded arrays on this process's first device; every process must call."""
    leaves = jax.tree.leaves(tree)
    mesh = getattr(leaves[0].sharding, "mesh", None)
    if mesh is None:
        return tree
    replicated = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), replicated)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
