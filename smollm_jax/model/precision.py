"""The dtypes of activations and of matmul operands, and float32 matmuls with the smallest rounding error.

XLA:CPU accumulates a dot product sequentially, so its rounding error grows with the square root of the number of
terms: 1.6 times PyTorch's for 576 terms, 1.7 times for 1,536 (measured). Blocked summation has 0.7 times PyTorch's
error at those sizes and takes up to a third more time. On a GPU "highest" alone turns TF32 off, and blocks do no harm.
"""

import contextlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def activation_and_operand_dtypes(dtype: str, platform: str) -> tuple[str, str]:
    """The dtypes of activations and of matmul operands when training in `dtype` on a platform.

    With AMX or AVX-512 BF16, XLA:CPU multiplies bfloat16 operands faster than float32 ones if the result is float32.
    A bfloat16 result is slower, and so are elementwise operations in bfloat16.
    """
    return ("float32", dtype) if (dtype, platform) == ("bfloat16", "cpu") else (dtype, dtype)


def wants_full_precision(dtype: jax.typing.DTypeLike) -> bool:
    """Whether matmuls of this dtype use blocked summation: float32 under `jax.default_matmul_precision("highest")`."""
    return dtype == jnp.float32 and jax.config.jax_default_matmul_precision == "highest"  # pyright: ignore


def without_tf32(dtype: jax.typing.DTypeLike) -> contextlib.AbstractContextManager:
    """A context in which float32 matmuls do not use TF32, the default of a GPU; a precision already set stays."""
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    is_float32 = dtype == jnp.float32
    return jax.default_matmul_precision("float32") if is_float32 and precision is None else contextlib.nullcontext()


def blocked_matmul(x: Float[Array, "*B I"], w: Float[Array, "I O"], block: int) -> Float[Array, "*B O"]:
    """x @ w as a sum of matmuls over blocks of the input axis I."""
    first, *others = [slice(i, i + block) for i in range(0, w.shape[0], block)]
    return sum((x[..., part] @ w[part] for part in others), x[..., first] @ w[first])
