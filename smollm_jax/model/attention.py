"""Attention variants (causal, packed documents, cached), each an `attend` function that the caller passes to the model.

`attend(q, k, v, cache) -> (out, cache)`: the layers know neither masks nor caches. `cache` is None or the KV cache,
which is passed along with the activations from layer to layer.

B batch, T query tokens, S cached tokens, N query heads, K KV heads, H head dim, L layers.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from smollm_jax.config import Config
from smollm_jax.model.flash_attention import block_attention

Implementation = Literal["xla", "cudnn"]
Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]


def attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Bool[Array, "#B 1 #T S"]
) -> Float[Array, "B T N H"]:
    """Grouped-query attention scaled by H**-0.5, softmax in at least float32; query head i reads KV head i // (N/K)."""
    if q.dtype == jnp.float64:
        # jax.nn.dot_product_attention rounds the scores to float32 before its softmax, even for float64 inputs.
        B, T, N, H = q.shape
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q.reshape(B, T, k.shape[2], -1, H), k) * H**-0.5
        scores = jnp.where(mask[..., None, :, :], scores, -0.7 * jnp.finfo(scores.dtype).max)
        return jnp.einsum("BKGTS,BSKH->BTKGH", jax.nn.softmax(scores), v).reshape(B, T, N, H)
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def causal(implementation: Implementation = "xla", operands: jax.typing.DTypeLike | None = None) -> Attend:
    """Causal attention, by cuDNN's kernel ("cudnn") or by `block_attention` ("xla")."""

    def attend(q, k, v, cache):
        if implementation == "xla":
            return block_attention(q, k, v, operands=operands), cache
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation), cache

    return attend


def cudnn_device_problem(device: Any, dtype: str) -> str:
    """Why cuDNN attention cannot run on this device in this dtype, as the end of a sentence ("needs ..."), or "".

    JAX parses a device's compute capability as two numbers (jax 0.10.2, jax/_src/cudnn/fused_attention_stablehlo.py,
    check_compute_capability), so ROCm's "gfx90a" and "9.0a" would raise a ValueError there.
    """
    if device.platform != "gpu" or dtype != "bfloat16":
        return f"needs a CUDA GPU and bfloat16, not {device.platform}, {dtype}"
    capability = str(getattr(device, "compute_capability", None))
    if not re.fullmatch(r"\d+\.\d+", capability):
        return f"needs a CUDA GPU whose compute capability is a number, not {capability}"
    return "" if float(capability) >= 8 else f"needs compute capability 8.0 or later, not {capability}"


def cudnn_shape_problem(length: int, head_dim: int, documents: bool) -> str:
    """Why cuDNN attention or its gradient does not support this shape, as the end of a sentence ("needs ..."), or "".

    JAX 0.10.2 refuses the gradient for odd lengths, even without documents, because it treats an empty bias as a bias.
    Even lengths are correct: cudnn-frontend pads lengths that 128 does not divide from 1.15 on (#160), and XLA has
    1.16.1. With documents, a length of 64 modulo 128 can give NaN gradients on Hopper (pytorch#196678). Before jax 0.11
    the gradient of the documents' bias is always computed, for which cuDNN stores the gradients of the scores,
    2 N T**2 bytes per row (cudnn-frontend, CompositeSDPABackwardNode); the switch that turns it off is private.
    """
    if head_dim % 8 or head_dim > 128:
        return f"needs a head_dim that is a multiple of 8, up to 128, not {head_dim}"
    if documents and length % 128:
        return f"with --mask-documents needs a --sequence-length that is a multiple of 128, not {length}"
    if length % 2:
        return f"needs an even --sequence-length, not {length}"
    if documents and jax.__version_info__ < (0, 11):
        return f"with --mask-documents needs jax 0.11, not {jax.__version__}, which adds the mask's gradient"
    return ""


def packed(
    segment_ids: Int[Array, "B T"],
    implementation: Implementation = "xla",
    operands: jax.typing.DTypeLike | None = None,
) -> Attend:
    """Causal attention within documents: a token attends only to earlier tokens of its own segment.

    cuDNN gets the segments as a bias `[B, 1, T, T]`, computed once per step for all layers: 2 T**2 bytes per row in
    bfloat16. Its interface for document offsets is private to JAX (jax#25812). `cudnn_shape_problem` lists the lengths
    whose gradients are correct.
    """

    def attend(q, k, v, cache):
        if implementation == "xla":
            return block_attention(q, k, v, segment_ids, operands=operands), cache
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=implementation), cache

    return attend


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers. Slots below `length` are filled; the next `attend` writes to layer `layer`."""

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    length: Int[Array, ""]
    layer: Int[Array, ""]

    @classmethod
    def empty(cls, config: Config, batch_size: int, cache_size: int, dtype: jax.typing.DTypeLike) -> "KVCache":
        """A cache for `cache_size` tokens per row, each of `cost.cache_bytes_per_token` bytes."""
        shape = (config.num_hidden_layers, batch_size, cache_size, config.num_key_value_heads, config.head_dim)
        zero = jnp.zeros((), jnp.int32)
        return cls(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype), length=zero, layer=zero)

    def advance(self, tokens: int) -> "KVCache":
        """The cache for the next forward pass: `length` grows by `tokens`, `layer` is the first again."""
        return dataclasses.replace(self, length=self.length + tokens, layer=jnp.zeros((), jnp.int32))

    def grow(self, cache_size: int) -> "KVCache":
        """The cache padded to `cache_size` tokens per row."""
        padding = [(0, 0), (0, 0), (0, cache_size - self.keys.shape[2]), (0, 0), (0, 0)]
        return dataclasses.replace(self, keys=jnp.pad(self.keys, padding), values=jnp.pad(self.values, padding))


def cached(start: Int[Array, "B"], *, empty: bool = False) -> Attend:
    """Causal attention over the cache: row b attends to slots `start[b]` up to its own, never to its left padding.

    `empty`: the cache holds no tokens yet, so queries attend only to the new keys, by `block_attention`.
    """

    def attend(q, k, v, cache: KVCache):
        zero = jnp.zeros((), jnp.int32)
        at = (cache.layer, zero, cache.length, zero, zero)
        # The whole cache is part of the scan's carry: as scanned inputs and outputs XLA would copy it three times.
        keys = jax.lax.dynamic_update_slice(cache.keys, k[None].astype(cache.keys.dtype), at)
        values = jax.lax.dynamic_update_slice(cache.values, v[None].astype(cache.values.dtype), at)
        if empty:
            out = block_attention(q, k, v, (jnp.arange(q.shape[1]) >= start[:, None]).astype(jnp.int32))
        else:
            slot = jnp.arange(keys.shape[2])
            query = cache.length + jnp.arange(q.shape[1])
            mask = (slot <= query[:, None]) & (slot >= start[:, None, None])
            out = attention(q, keys[cache.layer], values[cache.layer], mask[:, None])
        return out, dataclasses.replace(cache, keys=keys, values=values, layer=cache.layer + 1)

    return attend


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnstackedKVCache:
    """A `KVCache` with one array per layer, batch and heads merged, keys transposed.

    The matmuls of a single query read this layout directly. XLA:CPU would copy and transpose every layer of a stacked
    cache for each token.
    """

    keys: tuple[Float[Array, "BK H S"], ...]
    values: tuple[Float[Array, "BK S H"], ...]
    length: Int[Array, ""]
    layer: int = dataclasses.field(default=0, metadata={"static": True})

    @classmethod
    def from_stacked(cls, cache: KVCache) -> "UnstackedKVCache":
        L, B, S, K, H = cache.keys.shape
        keys = cache.keys.transpose(0, 1, 3, 4, 2).reshape(L, B * K, H, S)
        values = cache.values.transpose(0, 1, 3, 2, 4).reshape(L, B * K, S, H)
        return cls(tuple(keys), tuple(values), cache.length)

    def advance(self, tokens: int) -> "UnstackedKVCache":
        """As `KVCache.advance`."""
        return dataclasses.replace(self, length=self.length + tokens, layer=0)

    def grow(self, cache_size: int) -> "UnstackedKVCache":
        """As `KVCache.grow`."""
        padding = (0, cache_size - self.keys[0].shape[2])
        keys = tuple(jnp.pad(layer, [(0, 0), (0, 0), padding]) for layer in self.keys)
        values = tuple(jnp.pad(layer, [(0, 0), padding, (0, 0)]) for layer in self.values)
        return dataclasses.replace(self, keys=keys, values=values)

    def append(self, k: Float[Array, "B 1 K H"], v: Float[Array, "B 1 K H"]) -> "UnstackedKVCache":
        """The cache with the keys and values of one more token in layer `layer`."""
        i, H, zero = self.layer, k.shape[3], jnp.zeros((), jnp.int32)
        keys = jax.lax.dynamic_update_slice(self.keys[i], k.reshape(-1, H, 1), (zero, zero, self.length))
        values = jax.lax.dynamic_update_slice(self.values[i], v.reshape(-1, 1, H), (zero, self.length, zero))
        return dataclasses.replace(
            self,
            keys=(*self.keys[:i], keys, *self.keys[i + 1 :]),
            values=(*self.values[:i], values, *self.values[i + 1 :]),
            layer=i + 1,
        )


def cached_unstacked(start: Int[Array, "B"]) -> Attend:
    """`cached` for one query per row, over an `UnstackedKVCache`, in float32."""

    def attend(q, k, v, cache: UnstackedKVCache):
        (B, _, N, H), K = q.shape, k.shape[2]
        updated = cache.append(k, v)
        keys, values = updated.keys[cache.layer], updated.values[cache.layer]
        slot = jnp.arange(keys.shape[2])
        mask = (slot <= cache.length) & (slot >= start[:, None])
        scores = jnp.einsum("JGH,JHS->JGS", q.reshape(B * K, N // K, H) * H**-0.5, keys)
        scores = jnp.where(jnp.repeat(mask, K, axis=0)[:, None], scores, -jnp.inf)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        out = jnp.einsum("JGS,JSH->JGH", weights, values) / weights.sum(axis=-1, keepdims=True)
        return out.reshape(B, 1, N, H), updated

    return attend
