"""The operations of the model: RMSNorm, rotary positions, matrix products and SwiGLU, with their gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from smollm_jax.config import Config
from smollm_jax.model.precision import exactly, in_blocks

EXACT_BLOCK = 96  # terms summed at once where products must be as exact as float32 allows


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """Root-mean-square norm, computed in at least float32 and rounded to `x.dtype` before scaling.

    The order matters: HF rounds first and scales second, so scaling in float32 differs in bf16. The gradient is
    computed in at least float32 too: from jax's own rule a GPU sums the scale's over all tokens in bfloat16.
    Source: transformers, models/llama/modeling_llama.py, LlamaRMSNorm.forward; Zhang and Sennrich 2019.
    """
    return _normed(x, eps)[0].astype(x.dtype) * scale


def _normed(x, eps):
    """x over its root mean square, and one over that, in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    factor = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide * factor, factor


def _rms_norm_backward(eps, inputs, gradient):
    x, scale = inputs
    normed, factor = _normed(x, eps)
    gradient = gradient.astype(normed.dtype)
    of_scale = jnp.sum(gradient * normed, axis=range(x.ndim - 1))
    gradient *= scale
    of_x = factor * (gradient - normed * jnp.mean(gradient * normed, axis=-1, keepdims=True))
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype)


rms_norm.defvjp(lambda x, scale, eps: (rms_norm(x, scale, eps), (x, scale)), _rms_norm_backward)


def rotary_angles(positions: Int[Array, "*B T"], config: Config, dtype: jax.typing.DTypeLike) -> tuple[Array, Array]:
    """cos and sin `[*B, T, 1, H/2]` of every position and frequency, evaluated in at least float32.

    Source: Su et al. 2021 (RoFormer), section 3.2; transformers, modeling_llama.py, LlamaRotaryEmbedding.
    """
    # Constants on purpose: inside jit XLA may evaluate 1 / theta**x another way, one ulp off PyTorch.
    frequency = np.array(config.rotary_frequencies)
    wide = jnp.promote_types(dtype, jnp.float32)
    angle = positions[..., None, None].astype(wide) * frequency.astype(wide)
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x: Float[Array, "B T heads H"], cos: Array, sin: Array) -> Float[Array, "B T heads H"]:
    """Heads turned by their position, in HF's half-split layout: dimension i pairs with i + H/2."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def project(
    x: Float[Array, "B T I"],
    w: Float[Array, "I ..."],
    *,
    kept: bool = True,
    operands: jax.typing.DTypeLike | None = None,
) -> Float[Array, "B T ..."]:
    """x @ w in x's dtype, of numbers rounded to `operands` (default: that dtype).

    Under `jax.default_matmul_precision("highest")` as exact as float32 allows, see `precision.py`. `kept` is whether
    `Remat` "dots" (and so "swiglu") keeps it for the backward pass.
    """
    flat, operands = w.reshape(w.shape[0], -1), jnp.dtype(x.dtype if operands is None else operands)
    out: Any = in_blocks(x, flat, EXACT_BLOCK) if exactly(operands) else _matmul(x, flat, operands)
    out = out.reshape(*x.shape[:-1], *w.shape[1:])
    return checkpoint_name(out, "kept") if kept else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x, w, operands):
    return jnp.matmul(x.astype(operands), w.astype(operands), preferred_element_type=x.dtype)


def _matmul_backward(operands, inputs, gradient):
    x, w = inputs
    dtype = gradient.dtype
    narrow_x, narrow_w, gradient = (y.astype(operands) for y in (x, w, gradient))
    of_x = jnp.matmul(gradient, narrow_w.T, preferred_element_type=dtype)
    # Written out for w: from jax's own rule, dot(gradient, x) transposed, XLA:CPU makes a transposed copy of each
    # elementwise chain that leads to `gradient`, which costs a third of the MLP's backward pass at 2,048 tokens.
    flat = (y.reshape(-1, y.shape[-1]) for y in (narrow_x, gradient))
    return of_x, jnp.einsum("mi,mo->io", *flat, preferred_element_type=dtype).astype(w.dtype)


_matmul.defvjp(lambda x, w, operands: (_matmul(x, w, operands), (x, w)), _matmul_backward)


def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """silu(gate) * up (Shazeer 2020)."""
    return jax.nn.silu(gate) * up


@jax.custom_vjp
def swiglu_of_both(gate_up: Float[Array, "*B both"]) -> Float[Array, "*B F"]:
    """`swiglu` of two halves side by side. Its gradient is one kernel on a GPU; jax's own is three and a copy."""
    return swiglu(*jnp.split(gate_up, 2, axis=-1))


def _swiglu_backward(gate_up, gradient):
    halves = gate_up.reshape(*gate_up.shape[:-1], 2, -1).astype(jnp.promote_types(gate_up.dtype, jnp.float32))
    gate, up = halves[..., :1, :], halves[..., 1:, :]
    sigmoid = jax.nn.sigmoid(gate)
    slope = jnp.where(jnp.arange(2)[:, None] == 0, up * sigmoid * (1 + gate * (1 - sigmoid)), gate * sigmoid)
    return ((gradient[..., None, :] * slope).reshape(gate_up.shape).astype(gate_up.dtype),)


swiglu_of_both.defvjp(lambda gate_up: (swiglu_of_both(gate_up), gate_up), _swiglu_backward)
