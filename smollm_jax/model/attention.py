"""The ways a query may attend, each an `attend` function the caller hands to the model.

`attend(q, k, v, memory) -> (out, memory)`: the layers know neither masks nor caches. `memory` is None, or the
KV cache that travels with the activations from layer to layer.

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
        # jax.nn.dot_product_attention rounds the scores to float32 before its softmax whatever the inputs are.
        B, T, N, H = q.shape
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q.reshape(B, T, k.shape[2], -1, H), k) * H**-0.5
        scores = jnp.where(mask[..., None, :, :], scores, -0.7 * jnp.finfo(scores.dtype).max)
        return jnp.einsum("BKGTS,BSKH->BTKGH", jax.nn.softmax(scores), v).reshape(B, T, N, H)
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def causal(implementation: Implementation = "xla", operands: jax.typing.DTypeLike | None = None) -> Attend:
    """Every token sees itself and all tokens before it: by cuDNN's kernel, or in blocks that XLA compiles."""

    def attend(q, k, v, memory):
        if implementation == "xla":
            return block_attention(q, k, v, operands=operands), memory
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation), memory

    return attend


def lacks_cudnn(device: Any, dtype: str) -> str:
    """What cuDNN's attention needs that a device or a dtype does not give, to follow "cudnn"; "" where it runs.

    JAX itself reads a device's compute capability as two numbers (jax 0.10.2, jax/_src/cudnn/
    fused_attention_stablehlo.py, check_compute_capability): "gfx90a", ROCm's, and "9.0a" end in its ValueError.
    """
    if device.platform != "gpu" or dtype != "bfloat16":
        return f"needs a CUDA GPU and bfloat16, not {device.platform}, {dtype}"
    capability = str(getattr(device, "compute_capability", None))
    if not re.fullmatch(r"\d+\.\d+", capability):
        return f"needs a CUDA GPU whose compute capability is a number, not {capability}"
    return "" if float(capability) >= 8 else f"needs compute capability 8.0 or later, not {capability}"


def beyond_cudnn(length: int, head_dim: int, documents: bool) -> str:
    """What cuDNN's attention, or its gradient, needs that a shape does not give, to follow "cudnn"; "" where it does.

    JAX (0.10.2) refuses the gradient of odd lengths, causal ones too, for a bias of no elements counts as one there.
    Even ones are right: NVIDIA/cudnn-frontend pads those that 128 does not divide from 1.15 on (#160), and XLA has
    1.16.1. With documents one that leaves 64 of 128 can give NaN gradients on Hopper (pytorch#196678). Before jax 0.11
    the gradient of the documents' bias is always computed, for which cuDNN keeps the scores' gradients, 2 N T**2 bytes
    a row (cudnn-frontend, CompositeSDPABackwardNode): what would turn it off is private.
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
    """Causal within a document: a token sees only earlier tokens of its own segment.

    cuDNN gets the segments as a bias `[B, 1, T, T]`, which a compiled step makes once for all layers: 2 T**2 bytes a
    row in bfloat16. Its entry for the offsets of documents is private to JAX (jax#25812). `beyond_cudnn` says of which
    lengths its gradients are right.
    """

    def attend(q, k, v, memory):
        if implementation == "xla":
            return block_attention(q, k, v, segment_ids, operands=operands), memory
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=implementation), memory

    return attend


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer. Slots below `length` are written; `layer` is where the next `attend` writes."""

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    length: Int[Array, ""]
    layer: Int[Array, ""]

    @classmethod
    def empty(cls, config: Config, batch_size: int, slots: int, dtype: jax.typing.DTypeLike) -> "KVCache":
        """A cache for `slots` tokens a row: `cost.cache_bytes_per_token` bytes each."""
        shape = (config.num_hidden_layers, batch_size, slots, config.num_key_value_heads, config.head_dim)
        zero = jnp.zeros((), jnp.int32)
        return cls(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype), length=zero, layer=zero)

    def advance(self, tokens: int) -> "KVCache":
        """The cache as the next forward pass wants it, `tokens` slots later and back at the first layer."""
        return dataclasses.replace(self, length=self.length + tokens, layer=jnp.zeros((), jnp.int32))

    def grown(self, slots: int) -> "KVCache":
        """The same cache with `slots`."""
        room = [(0, 0), (0, 0), (0, slots - self.keys.shape[2]), (0, 0), (0, 0)]
        return dataclasses.replace(self, keys=jnp.pad(self.keys, room), values=jnp.pad(self.values, room))


def cached(start: Int[Array, "B"], *, empty: bool = False) -> Attend:
    """Causal over the cache: row b sees slots `start[b]` to its own, and never the left padding below `start`.

    `empty` says that nothing was written before: queries then meet only the keys that come with them, in blocks.
    """

    def attend(q, k, v, cache: KVCache):
        zero = jnp.zeros((), jnp.int32)
        at = (cache.layer, zero, cache.length, zero, zero)
        # The cache stays whole in the scan's carry: as scanned inputs and outputs XLA copies it three times.
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
class LayerCaches:
    """A `KVCache` taken apart: a layer's heads of all rows one after another, keys with slots last.

    The products of one query read it as it lies. Of a stacked cache XLA:CPU copies and turns each layer for each token.
    """

    keys: tuple[Float[Array, "BK H S"], ...]
    values: tuple[Float[Array, "BK S H"], ...]
    length: Int[Array, ""]
    layer: int = dataclasses.field(default=0, metadata={"static": True})

    @classmethod
    def of(cls, cache: KVCache) -> "LayerCaches":
        L, B, S, K, H = cache.keys.shape
        keys = cache.keys.transpose(0, 1, 3, 4, 2).reshape(L, B * K, H, S)
        values = cache.values.transpose(0, 1, 3, 2, 4).reshape(L, B * K, S, H)
        return cls(tuple(keys), tuple(values), cache.length)

    def advance(self, tokens: int) -> "LayerCaches":
        """As `KVCache.advance`."""
        return dataclasses.replace(self, length=self.length + tokens, layer=0)

    def grown(self, slots: int) -> "LayerCaches":
        """As `KVCache.grown`."""
        more = (0, slots - self.keys[0].shape[2])
        keys = tuple(jnp.pad(layer, [(0, 0), (0, 0), more]) for layer in self.keys)
        values = tuple(jnp.pad(layer, [(0, 0), more, (0, 0)]) for layer in self.values)
        return dataclasses.replace(self, keys=keys, values=values)

    def put(self, k: Float[Array, "B 1 K H"], v: Float[Array, "B 1 K H"]) -> "LayerCaches":
        """The cache with one more token of the layer whose turn it is."""
        i, H, zero = self.layer, k.shape[3], jnp.zeros((), jnp.int32)
        keys = jax.lax.dynamic_update_slice(self.keys[i], k.reshape(-1, H, 1), (zero, zero, self.length))
        values = jax.lax.dynamic_update_slice(self.values[i], v.reshape(-1, 1, H), (zero, self.length, zero))
        return dataclasses.replace(
            self,
            keys=(*self.keys[:i], keys, *self.keys[i + 1 :]),
            values=(*self.values[:i], values, *self.values[i + 1 :]),
            layer=i + 1,
        )


def cached_by_layer(start: Int[Array, "B"]) -> Attend:
    """`cached` for one query a row, over `LayerCaches`, in float32."""

    def attend(q, k, v, cache: LayerCaches):
        (B, _, N, H), K = q.shape, k.shape[2]
        after = cache.put(k, v)
        keys, values = after.keys[cache.layer], after.values[cache.layer]
        slot = jnp.arange(keys.shape[2])
        seen = (slot <= cache.length) & (slot >= start[:, None])
        scores = jnp.einsum("JGH,JHS->JGS", q.reshape(B * K, N // K, H) * H**-0.5, keys)
        scores = jnp.where(jnp.repeat(seen, K, axis=0)[:, None], scores, -jnp.inf)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        out = jnp.einsum("JGS,JSH->JGH", weights, values) / weights.sum(axis=-1, keepdims=True)
        return out.reshape(B, 1, N, H), after

    return attend
