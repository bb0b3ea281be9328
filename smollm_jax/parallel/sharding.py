"""The mesh of devices and the shardings of parameters, optimizer state and batches: data parallel and ZeRO-3 style.

A mesh has two axes, and the rows of a batch are sharded over both. `data` replicates the parameters; `fsdp` shards
parameters and optimizer state. Inside `shard_map` each device computes the gradients of its rows with the whole model,
so that model, attention and loss are written for one device. Communication in a step, for any number of micro-batches:
parameters are all-gathered once over `fsdp`, gradients are summed once.
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
BATCH_SPEC = PartitionSpec(AXES)  # rows, the first dimension, over all devices
REPLICATED = PartitionSpec()


def parse_mesh(text: str) -> dict[str, int]:
    """The size of each mesh axis in a text such as "data=4,fsdp=2"; an axis that is not named has size 1.

    Raises `UsageError` for another axis, or a size below 1.
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isascii() or not size.isdigit() or int(size) < 1:
            raise UsageError(f"--mesh {text}: expected data=N, fsdp=N or data=N,fsdp=N, got {part!r}")
        sizes[name] = int(size)
    return sizes


def make_mesh(text: str) -> Mesh:
    """The mesh that a text such as "data=4,fsdp=2" describes; with several processes it must use every device.

    Raises `UsageError` as `parse_mesh` does, and for a number of devices that this run does not have.
    """
    sizes = parse_mesh(text)
    size, available = math.prod(sizes.values()), jax.device_count()
    if size > available or (jax.process_count() > 1 and size < available):
        raise UsageError(f"--mesh {text}: describes {size} devices, but JAX sees {available}")
    devices = None if size == available else jax.devices()[:size]
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto, AxisType.Auto), devices=devices)


def fsdp_spec(shape: tuple[int, ...], mesh: Mesh | None) -> PartitionSpec:
    """How a parameter or its optimizer state is sharded over `fsdp`: along its largest divisible dimension, or not."""
    shards = 1 if mesh is None else mesh.shape["fsdp"]
    sizes = [size if shards > 1 and size % shards == 0 else 0 for size in shape]
    if not any(sizes):
        return PartitionSpec()
    return PartitionSpec(*[None] * int(np.argmax(sizes)), "fsdp")


def fsdp_specs(tree: Any, mesh: Mesh | None) -> Any:
    """`fsdp_spec` of every leaf, in the tree's structure."""
    return jax.tree.map(lambda x: fsdp_spec(x.shape, mesh), tree)


def shardings(tree: Any, mesh: Mesh | None) -> Any:
    """The sharding of every leaf of parameters or optimizer state; without a mesh, the first device."""
    if mesh is None:
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), tree)
    return jax.tree.map(lambda x: NamedSharding(mesh, fsdp_spec(x.shape, mesh)), tree)


def abstract(tree: Any, mesh: Mesh | None) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays, as `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh))


def shard_params(tree: Any, mesh: Mesh | None) -> Any:
    """Parameters on their devices, sharded; every process passes the same full arrays."""
    if mesh is None:
        return jax.device_put(tree)
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: np.asarray(x)[index]),
        tree,
        shardings(tree, mesh),
    )


def shard_batch(read_rows: Callable[[slice], Any], shapes: Any, mesh: Mesh | None) -> Any:
    """A batch of arrays of these `shapes` on its devices; `read_rows(slice)` returns rows of the full batch."""
    if mesh is None:
        return jax.device_put(read_rows(slice(None)))
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda shape: isinstance(shape, tuple))

    def sharded(number: int, shape: tuple[int, ...]) -> Array:
        read_shard = lambda index: jax.tree.leaves(read_rows(index[0]))[number]  # noqa: E731
        return jax.make_array_from_callback(shape, NamedSharding(mesh, BATCH_SPEC), read_shard)

    return jax.tree.unflatten(structure, [sharded(number, shape) for number, shape in enumerate(leaves)])


def all_gather_params(shards: Any, specs: Any) -> Any:
    """Inside `shard_map`: full parameters, all-gathered over `fsdp`."""

    def gather(x, spec):
        return jax.lax.all_gather(x, "fsdp", axis=len(spec) - 1, tiled=True) if spec else x

    return jax.tree.map(gather, shards, specs)


def reduce_scatter_grads(gradients: Any, specs: Any) -> Any:
    """Inside `shard_map`: gradients summed over all devices, each of which keeps the shard of its parameters."""

    def add(x, spec):
        if not spec:
            return jax.lax.psum(x, AXES)
        if jax.default_backend() == "cpu" and jax.distributed.is_initialized():
            # Gloo, the backend between CPU processes, sometimes gives the first process a wrong reduce-scatter
            # (jax-ml/jax#40830); its all-reduce is right.
            size = x.shape[len(spec) - 1] // jax.lax.axis_size("fsdp")
            total, start = jax.lax.psum(x, AXES), jax.lax.axis_index("fsdp") * size
            return jax.lax.dynamic_slice_in_dim(total, start, size, len(spec) - 1)
        # Scatter first: then only a shard is summed over `data`, which may connect machines.
        return jax.lax.psum(jax.lax.psum_scatter(x, "fsdp", scatter_dimension=len(spec) - 1, tiled=True), "data")

    # A spec may stand for a whole tree.
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(
        lambda spec, part: jax.tree.map(lambda x: add(x, spec), part), specs, gradients, is_leaf=is_spec
    )
