"""Several processes, one run: how they meet, and what they have to agree on. The engine is `jax.distributed`.

Files are written by the first process, in a folder that all of them see; arrays by each its own part (Orbax).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from smollm_jax.errors import PeerError, SmolLMError, UsageError


def connect(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Meets the other processes of the run, found by Slurm's or MPI's variables or by what is given here.

    Call before any other use of JAX. Raises `UsageError` where neither says enough, `PeerError` when the others do not
    come within five minutes. A process that is silent for 100 seconds ends all others.
    """
    # It would take SIGTERM for itself; what a signal means here, `runtime/signals.py` and `AnyProcess` say.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"--distributed: {error} Under Slurm or mpirun nothing is needed; elsewhere give --coordinator-address, "
            "--num-processes and --process-id"
        ) from error
    except RuntimeError as error:
        where = coordinator_address or "the coordinator"
        raise PeerError(f"--distributed: {where} could not be reached: {_first_line(error)}") from error


def first() -> bool:
    """Whether this process is the one that writes files and speaks to the reader."""
    return jax.process_index() == 0


@contextlib.contextmanager
def one_for_all() -> Iterator[None]:
    """Turns what a process sees when another one has gone into a `PeerError`; other errors pass."""
    try:
        yield
    except SmolLMError:
        raise
    except (RuntimeError, ValueError) as error:  # jax's own, of either kind
        text = str(error)
        if jax.process_count() == 1 or not any(name in text for name in ("Gloo", "NCCL", "oordination", "DEADLINE")):
            raise
        raise PeerError(
            f"process {jax.process_index()} of {jax.process_count()}: another process of this run has gone, its own "
            f"output says why; start all of them again with --resume ({_first_line(error)})"
        ) from error


class AnyProcess:
    """Whether any process claims something, with the same answer in all of them at the same call.

    Each call is answered with the claims of the call before, so that none waits for a step that is under way.
    """

    def __init__(self) -> None:
        self._asked: Any = None
        if jax.process_count() > 1:
            mesh = jax.make_mesh((jax.device_count(),), ("all",), (AxisType.Auto,))
            self._each, once = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
            self._any = jax.jit(lambda claims: claims.any(), out_shardings=once)

    def __call__(self, claim: bool) -> bool:
        if jax.process_count() == 1:
            return claim
        before = self._asked
        claims = jax.make_array_from_callback((jax.device_count(),), self._each, lambda _: np.array([claim]))
        self._asked = self._any(claims)
        return before is not None and bool(before)


def wait_for_all(name: str) -> None:
    """Returns when every process has called this; `name` is the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def of_all(number: int) -> set[int]:
    """What every process gives for a number, when all have given it."""
    if jax.process_count() == 1:
        return {number}
    return set(np.asarray(multihost_utils.process_allgather(np.int64(number))).ravel().tolist())


def whole(tree: Any) -> Any:
    """Arrays of this process's own first device, from arrays that may be spread over all; every process must call."""
    leaves = jax.tree.leaves(tree)
    mesh = getattr(leaves[0].sharding, "mesh", None)
    if mesh is None:
        return tree
    everywhere = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), everywhere)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
