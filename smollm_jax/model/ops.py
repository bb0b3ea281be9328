"""The operations of the model: RMSNorm, rotary positions, linear layers and SwiGLU, with their gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from smollm_jax.config import Config
from smollm_jax.model.precision import blocked_matmul, wants_full_precision

EXACT_BLOCK = 96  # terms per block of a `blocked_matmul`


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """Root-mean-square norm, computed in at least float32 and rounded to `x.dtype` before scaling.

    The order matters: HF rounds first and scales second, so scaling in float32 differs in bf16. The gradient is
    computed in at least float32 too: JAX's own rule lets a GPU sum the gradient of `scale` over tokens in bfloat16.
    Source: transformers, models/llama/modeling_llama.py, LlamaRMSNorm.forward; Zhang and Sennrich 2019.
    """
    return _normalize(x, eps)[0].astype(x.dtype) * scale


def _normalize(x, eps):
    """x divided by its root mean square, and the inverse of that, in at least float32."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * inverse_rms, inverse_rms


def _rms_norm_backward(eps, residuals, gradient):
    x, scale = residuals
    normalized, inverse_rms = _normalize(x, eps)
    gradient = gradient.astype(normalized.dtype)
    dscale = jnp.sum(gradient * normalized, axis=range(x.ndim - 1))
    gradient *= scale
    dx = inverse_rms * (gradient - normalized * jnp.mean(gradient * normalized, axis=-1, keepdims=True))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(lambda x, scale, eps: (rms_norm(x, scale, eps), (x, scale)), _rms_norm_backward)


def rope_cos_sin(positions: Int[Array, "*B T"], config: Config, dtype: jax.typing.DTypeLike) -> tuple[Array, Array]:
    """cos and sin `[*B, T, 1, H/2]` of every position and frequency, evaluated in at least float32.

    Source: Su et al. 2021 (RoFormer), section 3.2; transformers, modeling_llama.py, LlamaRotaryEmbedding.
    """
    # Constants on purpose: inside jit XLA may evaluate 1 / theta**x another way, one ulp off PyTorch.
    frequency = np.array(config.rotary_frequencies)
    angle_dtype = jnp.promote_types(dtype, jnp.float32)
    angle = positions[..., None, None].astype(angle_dtype) * frequency.astype(angle_dtype)
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def apply_rope(x: Float[Array, "B T heads H"], cos: Array, sin: Array) -> Float[Array, "B T heads H"]:
    """Heads rotated by position, in HF's half-split layout: dimension i pairs with i + H/2."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def linear(
    x: Float[Array, "B T I"],
    w: Float[Array, "I ..."],
    *,
    save: bool = True,
    operands: jax.typing.DTypeLike | None = None,
) -> Float[Array, "B T ..."]:
    """x @ w in x's dtype, with both inputs rounded to `operands` (default: that dtype).

    Under `jax.default_matmul_precision("highest")` summation is blocked, see `precision.py`. `save`: `Remat` "dots"
    and "swiglu" save the result for the backward pass.
    """
    flat, operands = w.reshape(w.shape[0], -1), jnp.dtype(x.dtype if operands is None else operands)
    out: Any = blocked_matmul(x, flat, EXACT_BLOCK) if wants_full_precision(operands) else _matmul(x, flat, operands)
    out = out.reshape(*x.shape[:-1], *w.shape[1:])
    return checkpoint_name(out, "dots") if save else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x, w, operands):
    return jnp.matmul(x.astype(operands), w.astype(operands), preferred_element_type=x.dtype)


def _matmul_backward(operands, residuals, gradient):
    x, w = residuals
    dtype = gradient.dtype
    rounded_x, rounded_w, gradient = (y.astype(operands) for y in (x, w, gradient))
    dx = jnp.matmul(gradient, rounded_w.T, preferred_element_type=dtype)
    # JAX's own rule for w, dot(gradient, x) transposed, makes XLA:CPU copy and transpose each elementwise chain that
    # leads to `gradient`, which costs a third of the MLP's backward pass at 2,048 tokens.
    flat = (y.reshape(-1, y.shape[-1]) for y in (rounded_x, gradient))
    return dx, jnp.einsum("mi,mo->io", *flat, preferred_element_type=dtype).astype(w.dtype)


_matmul.defvjp(lambda x, w, operands: (_matmul(x, w, operands), (x, w)), _matmul_backward)


def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """silu(gate) * up (Shazeer 2020)."""
    return jax.nn.silu(gate) * up


@jax.custom_vjp
def fused_swiglu(gate_up: Float[Array, "*B both"]) -> Float[Array, "*B F"]:
    """`swiglu` of gate and up concatenated. Its gradient is one kernel on a GPU; JAX's own is three and a copy."""
    return swiglu(*jnp.split(gate_up, 2, axis=-1))


def _swiglu_backward(gate_up, gradient):
    halves = gate_up.reshape(*gate_up.shape[:-1], 2, -1).astype(jnp.promote_types(gate_up.dtype, jnp.float32))
    gate, up = halves[..., :1, :], halves[..., 1:, :]
    sigmoid = jax.nn.sigmoid(gate)
    derivative = jnp.where(jnp.arange(2)[:, None] == 0, up * sigmoid * (1 + gate * (1 - sigmoid)), gate * sigmoid)
    return ((gradient[..., None, :] * derivative).reshape(gate_up.shape).astype(gate_up.dtype),)


fused_swiglu.defvjp(lambda gate_up: (fused_swiglu(gate_up), gate_up), _swiglu_backward)
