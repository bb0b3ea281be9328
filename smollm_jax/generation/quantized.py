"""A model with quantized weight matrices, for decoding on a CPU, whose speed is limited by reading the weights.

"bf16" rounds the weights to bfloat16. "int8" is GGUF's q8_0: blocks of 32 weights along the input axis, each an int8,
with one float16 scale per block. Activations, accumulation and the cache are float32.

B batch, T query tokens, I and O a matrix's inputs and outputs, D hidden, N query heads, H head dim, F MLP, V vocab.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Float16, Int, Int8

from smollm_jax import weights
from smollm_jax.config import Config
from smollm_jax.errors import UsageError, short_repr
from smollm_jax.model.attention import Attend
from smollm_jax.model.ops import apply_rope, fused_swiglu, rms_norm, rope_cos_sin
from smollm_jax.model.smollm import SmolLM

Quantize = Literal["bf16", "int8"]
BLOCK = 32  # weights per scale


def validate_quantize(kind: object, dtype: Any) -> None:
    """Raises `UsageError` for an unknown kind, a dtype other than float32, or a device that is not a CPU."""
    if kind not in get_args(Quantize):
        raise UsageError(f"quantize must be one of {', '.join(get_args(Quantize))}, got {short_repr(kind)}")
    if jnp.dtype(dtype) != jnp.float32:
        raise UsageError(f"--quantize {kind} computes in float32: use --dtype float32, not {jnp.dtype(dtype)}")
    if (platform := jax.default_backend()) != "cpu":
        raise UsageError(f"--quantize {kind} is only for CPUs, not a {platform}: use --dtype bfloat16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """A matrix in q8_0: entry (o, i) is values[o, i] * scales[o, i // 32]."""

    values: Int8[Any, "O I"]
    scales: Float16[Any, "O blocks"]


Matrix = Blocks | Array  # [O, I] of bfloat16


def to_blocks(matrix: np.ndarray) -> Blocks:
    """Quantizes a matrix [O, I] to q8_0.

    Rounds as ggml's reference: by the float32 scale, halves away from zero; the scale is then stored as float16.
    Source: ggml, src/ggml-quants.c, `quantize_row_q8_0_ref`. Raises `UsageError` unless I is a multiple of 32.
    """
    if matrix.shape[1] % BLOCK:
        raise UsageError(f"--quantize int8 needs rows of a multiple of {BLOCK} values, got {matrix.shape[1]}")
    blocks = np.asarray(matrix, np.float32).reshape(len(matrix), -1, BLOCK)
    scales = np.abs(blocks).max(axis=-1) / np.float32(127)
    with np.errstate(over="ignore"):
        stored = scales.astype(np.float16)
    if not np.isfinite(stored).all():
        raise UsageError("--quantize int8: a matrix has values beyond 127 times 65,504, the largest float16")
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    x = blocks * inverse[..., None]
    values = np.trunc(x + np.copysign(np.float32(0.5), x)).astype(np.int8)
    return Blocks(values.reshape(matrix.shape), stored)


def dequantize(matrix: Matrix) -> Float[Any, "O I"]:
    """The exact float32 values of a matrix."""
    if not isinstance(matrix, Blocks):
        return matrix.astype(jnp.float32)
    values = matrix.values.reshape(*matrix.scales.shape, BLOCK).astype(jnp.float32)
    return (values * matrix.scales[..., None].astype(jnp.float32)).reshape(matrix.values.shape)


def quantized_linear(x: Float[Array, "B T I"], matrix: Matrix, ones: Float[Array, "max"]) -> Float[Array, "B T O"]:
    """x @ matrix.T; `ones` must have at least I entries.

    The barrier keeps the cast next to the matmul, which then reads the quantized matrix: XLA would otherwise hoist the
    cast out of the decode loop, which would then read float32. The division makes XLA:CPU compute x only once: cheaper
    operations it would fuse into the matmul and repeat for every row of the matrix.
    """
    x, matrix = jax.lax.optimization_barrier((x / ones[: x.shape[-1]], matrix))
    return x @ dequantize(matrix).T


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """`DecoderLayer` with quantized matrices: q, k and v in one, and gate and up in one."""

    input_layernorm: Float[Array, "D"]
    qkv_proj: Matrix
    o_proj: Matrix
    post_attention_layernorm: Float[Array, "D"]
    gate_up_proj: Matrix
    down_proj: Matrix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Quantized matrices for decoding, and a float32 `model` with the same rounded weights for the prefill."""

    model: SmolLM
    layers: tuple[Layer, ...]
    head: Matrix
    ones: Float[Array, "max"]  # see `quantized_linear`

    @classmethod
    def from_model(cls, model: SmolLM, kind: Quantize, stored: Mapping[str, Blocks] | None = None) -> "Quantized":
        """Quantizes a float32 model; matrices in `stored` (by Hugging Face's name) are used as they are.

        Raises `UsageError` as `validate_quantize` and `to_blocks` do.
        """
        validate_quantize(kind, model.embed_tokens.dtype)
        bundle = weights.to_bundle(model)
        tensors: dict[str, Any] = dict(bundle.tensors)
        for name in [name for name, tensor in tensors.items() if tensor.ndim == 2]:
            tensors[name] = (stored or {}).get(name) or _quantize(tensors[name], kind)
        dequantized = {name: np.asarray(dequantize(t)) if isinstance(t, Blocks) else t for name, t in tensors.items()}
        rounded = weights.from_bundle(dataclasses.replace(bundle, tensors=dequantized))
        head = tensors["model.embed_tokens.weight" if model.lm_head is None else "lm_head.weight"]
        layers = tuple(_layer(tensors, f"model.layers.{i}.") for i in range(model.config.num_hidden_layers))
        c = model.config
        ones = jnp.ones(max(c.hidden_size, c.num_attention_heads * c.head_dim, c.intermediate_size))
        return cls(rounded, layers, jax.tree.map(jnp.array, head), ones)

    @property
    def config(self) -> Config:
        return self.model.config

    def hidden_states(
        self, tokens: Int[Array, "B T"], *, positions: Int[Array, "B T"], attend: Attend, cache: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        """`SmolLM.hidden_states` for tokens already known to be in the vocabulary."""
        N, H, eps = self.config.num_attention_heads, self.config.head_dim, self.config.rms_norm_eps
        x = self.model.embed_tokens[...][tokens]
        # Divided by one to be computed only once, as x in `quantized_linear`.
        cos, sin = (angle / self.ones[: H // 2] for angle in rope_cos_sin(positions, self.config, x.dtype))
        for layer in self.layers:
            qkv = quantized_linear(rms_norm(x, layer.input_layernorm, eps), layer.qkv_proj, self.ones)
            qkv = qkv.reshape(*tokens.shape, -1, H)
            q, k, v = jnp.split(qkv, (N, (N + qkv.shape[-2]) // 2), axis=-2)
            out, cache = attend(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, cache)
            x = x + quantized_linear(out.reshape(*tokens.shape, N * H), layer.o_proj, self.ones)
            gate_up = quantized_linear(rms_norm(x, layer.post_attention_layernorm, eps), layer.gate_up_proj, self.ones)
            x = x + quantized_linear(fused_swiglu(gate_up), layer.down_proj, self.ones)
        return rms_norm(x, self.model.norm[...], eps), cache

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """`SmolLM.logits`."""
        return quantized_linear(hidden, self.head, self.ones)


def _quantize(matrix: np.ndarray, kind: Quantize) -> Any:
    return to_blocks(matrix) if kind == "int8" else matrix.astype(ml_dtypes.bfloat16)


def _layer(tensors: Mapping[str, Any], prefix: str) -> Layer:
    """A layer from Hugging Face's tensors, which are `[out, in]` as needed here."""

    def joined(*names: str) -> Any:
        matrices = [tensors[f"{prefix}{name}.weight"] for name in names]
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), *matrices)

    return Layer(
        joined("input_layernorm"),
        joined("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        joined("self_attn.o_proj"),
        joined("post_attention_layernorm"),
        joined("mlp.gate_proj", "mlp.up_proj"),
        joined("mlp.down_proj"),
    )
