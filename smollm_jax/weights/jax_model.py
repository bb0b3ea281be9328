"""The JAX model from weights of any format (`load`), and from and to a `Bundle`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smollm_jax.config import Config
from smollm_jax.errors import UsageError
from smollm_jax.runs.pytree import flatten, unflatten
from smollm_jax.weights.bundle import Bundle
from smollm_jax.weights.convert import read
from smollm_jax.weights.mapping import stack_layers, to_hf

if TYPE_CHECKING:
    from smollm_jax.model.smollm import SmolLM


def load(path: str | Path, dtype: Any = np.float32, adapter: Path | None = None) -> "tuple[SmolLM, Config]":
    """The JAX model from a path of any kind, with parameters of `dtype`, and its config; `adapter` as in `read`.

    float64 needs `jax.config.update("jax_enable_x64", True)` first, else `UsageError`: JAX would silently truncate.
    """
    bundle = read(path, mapped=True, adapter=adapter)
    return from_bundle(bundle, dtype), bundle.config


def from_bundle(bundle: Bundle, dtype: Any = np.float32) -> "SmolLM":
    """The JAX model with validated weights."""
    import jax
    import jax.numpy as jnp

    from smollm_jax.model.smollm import SmolLM

    dtype = np.dtype(dtype)
    if dtype == np.float64 and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise UsageError("float64 needs jax_enable_x64: set JAX_ENABLE_X64=1")
    abstract = jax.eval_shape(lambda: SmolLM(bundle.config, key=jax.random.key(0)))
    # One parameter at a time, so that the next one reuses the NumPy memory. `jnp.array` copies: a train step could not
    # donate buffers that JAX only borrows from NumPy.
    parameters = stack_layers(bundle.tensors, bundle.config, dtype)
    return unflatten(abstract, {path: jnp.array(array) for path, array in parameters})


def to_bundle(model: "SmolLM", origin: str = "", tokenizer_files: dict[str, bytes] | None = None) -> Bundle:
    """A JAX model's parameters as Hugging Face's tensors."""
    parameters = {path: np.asarray(array) for path, array in flatten(model).items()}
    return Bundle(to_hf(parameters, model.config), model.config, tokenizer_files or {}, origin)
