"""The dtypes of activations and of what is multiplied; products as exact as float32 allows, where they are asked for.

XLA:CPU adds up the terms of a product one by one, so that its rounding error grows with the root of their number: 1.6
times PyTorch's for 576 terms, 1.7 times for 1,536 (measured). Sums of blocks, added up, have 0.7 times PyTorch's error
at those sizes, for up to a third more time. On a GPU "highest" alone turns TF32 off, and blocks do no harm.
"""

import contextlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def activations_and_operands(dtype: str, platform: str) -> tuple[str, str]:
    """The dtypes of activations and of what matrix products multiply, where a platform trains in `dtype`.

    With AMX or AVX-512 BF16 XLA:CPU multiplies bfloat16 faster than float32 where the result is float32; where it is
    bfloat16, slower, and so is everything between products.
    """
    return ("float32", dtype) if (dtype, platform) == ("bfloat16", "cpu") else (dtype, dtype)


def exactly(dtype: jax.typing.DTypeLike) -> bool:
    """Whether products of this dtype are to be exact: float32 under `jax.default_matmul_precision("highest")`."""
    return dtype == jnp.float32 and jax.config.jax_default_matmul_precision == "highest"  # pyright: ignore


def float32_as_it_is(dtype: jax.typing.DTypeLike) -> contextlib.AbstractContextManager:
    """Products of this dtype as the process chose, else float32 as it is: a GPU would take TF32."""
    chosen = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    wide = dtype == jnp.float32
    return jax.default_matmul_precision("float32") if wide and chosen is None else contextlib.nullcontext()


def in_blocks(x: Float[Array, "*B I"], w: Float[Array, "I O"], block: int) -> Float[Array, "*B O"]:
    """x @ w, summed over blocks of I."""
    parts = [slice(i, i + block) for i in range(0, w.shape[0], block)]
    return sum((x[..., part] @ w[part] for part in parts[1:]), x[..., parts[0]] @ w[parts[0]])
