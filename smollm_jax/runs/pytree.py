"""Flattens a pytree to arrays by dotted path, and back. Imports JAX only when called."""

from typing import Any

from smollm_jax.errors import CheckpointError

Arrays = dict[str, Any]


def flatten(tree: Any) -> Arrays:
    """The tree's arrays by dotted path, "layers.mlp.up_proj": the names checkpoints and weight rules use."""
    import jax

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): leaf for path, leaf in leaves}


def unflatten(like: Any, arrays: Arrays) -> Any:
    """A tree with the structure of `like` and the arrays of the same names; `CheckpointError` lists all mismatches.

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

    # An nnx.Param is a node with one child, "value": drop that name.
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
