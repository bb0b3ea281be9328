"""One mesh for many devices: what each of them holds, computes and sends.

A mesh has two axes. Along `data` devices hold the same parameters and work on different rows of a batch; along `fsdp`
they work on different rows too, and share parameters and moments out among themselves. Each device computes the
gradients of its rows with the whole model, so that model, attention and loss are written for one device. What travels
in a step, however many parts the batch is computed in: parameters once, gathered over `fsdp`; gradients once, summed.
Source: Rajbhandari et al. 2020 (ZeRO), section 5.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array

from smollm_jax.errors import UsageError

AXES = ("data", "fsdp")
ROWS = PartitionSpec(AXES)  # of a batch: the first dimension, over all devices
ONCE = PartitionSpec()  # whole, on every device


def sizes_of(text: str) -> dict[str, int]:
    """The size of each axis of the mesh that "data=4,fsdp=2" describes, one left out being 1; or `UsageError`."""
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isascii() or not size.isdigit() or int(size) < 1:
            raise UsageError(f"--mesh {text}: expected data=N, fsdp=N or both with a comma between, got {part!r}")
        sizes[name] = int(size)
    return sizes


def make_mesh(text: str) -> Mesh:
    """The mesh that "data=4,fsdp=2" describes; of all devices when there are many processes.

    Raises `UsageError` for another axis or size, or more devices than there are.
    """
    sizes = sizes_of(text)
    wanted, there = math.prod(sizes.values()), jax.device_count()
    if wanted > there or (jax.process_count() > 1 and wanted < there):
        raise UsageError(f"--mesh {text}: {wanted} devices, and there are {there}")
    devices = None if wanted == there else jax.devices()[:wanted]
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto, AxisType.Auto), devices=devices)


def spec(shape: tuple[int, ...], mesh: Mesh | None) -> PartitionSpec:
    """Which dimension of a parameter or moment is cut over `fsdp`: the largest that can be, or none."""
    ways = 1 if mesh is None else mesh.shape["fsdp"]
    sizes = [size if ways > 1 and size % ways == 0 else 0 for size in shape]
    if not any(sizes):
        return PartitionSpec()
    return PartitionSpec(*[None] * int(np.argmax(sizes)), "fsdp")


def specs(tree: Any, mesh: Mesh | None) -> Any:
    """`spec` of every leaf, in the tree's structure."""
    return jax.tree.map(lambda x: spec(x.shape, mesh), tree)


def shardings(tree: Any, mesh: Mesh | None) -> Any:
    """Where every leaf of parameters or optimizer state lies; without a mesh, on the first device."""
    if mesh is None:
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), tree)
    return jax.tree.map(lambda x: NamedSharding(mesh, spec(x.shape, mesh)), tree)


def abstract(tree: Any, mesh: Mesh | None) -> Any:
    """Shapes and dtypes of a tree of arrays, with where they lie."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh))


def put(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays that every process has whole, laid where they belong."""
    if mesh is None:
        return jax.device_put(tree)
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: np.asarray(x)[index]),
        tree,
        shardings(tree, mesh),
    )


def put_rows(rows: Callable[[slice], np.ndarray], shape: tuple[int, int], mesh: Mesh | None) -> Array:
    """A batch of `shape` on its devices, of which `rows(slice)` reads the rows a device asks for."""
    if mesh is None:
        return jax.device_put(rows(slice(None)))

    def of_device(index: Any) -> np.ndarray:
        return rows(index[0])

    return jax.make_array_from_callback(shape, NamedSharding(mesh, ROWS), of_device)


def gathered(shards: Any, specs: Any) -> Any:
    """Inside `shard_map`: whole parameters, from the part every device along `fsdp` holds."""

    def gather(x, spec):
        return jax.lax.all_gather(x, "fsdp", axis=len(spec) - 1, tiled=True) if spec else x

    return jax.tree.map(gather, shards, specs)


def summed(gradients: Any, specs: Any) -> Any:
    """Inside `shard_map`: the sum over all devices, of which each keeps the part it holds parameters of."""

    def add(x, spec):
        if not spec:
            return jax.lax.psum(x, AXES)
        if jax.default_backend() == "cpu" and jax.distributed.is_initialized():
            # Gloo, which sends between processes of CPUs, now and then scatters a wrong sum to the first
            # (jax-ml/jax#40830); its whole sums are right.
            size = x.shape[len(spec) - 1] // jax.lax.axis_size("fsdp")
            whole, place = jax.lax.psum(x, AXES), jax.lax.axis_index("fsdp") * size
            return jax.lax.dynamic_slice_in_dim(whole, place, size, len(spec) - 1)
        # Scattered first, so that what is summed over `data`, perhaps between machines, is a part.
        return jax.lax.psum(jax.lax.psum_scatter(x, "fsdp", scatter_dimension=len(spec) - 1, tiled=True), "data")

    return jax.tree.map(add, gradients, specs)
