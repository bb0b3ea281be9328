"""A KV cache of independent slots, each filled to a length of its own, and attention over it.

Several texts share one cache and one batch: each has a slot, and joins and leaves when it likes. Attention goes over
blocks of cached tokens, as many as the longest text needs, so that a large cache costs nothing while texts are short.

L layers, B slots, R slots of a call, T query tokens, S cached tokens, N query heads, K KV heads, H head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from smollm_jax.config import Config
from smollm_jax.model.attention import Attend

CPU_BLOCK = 128  # cached tokens read at once; with 64 a long text takes 1.4 times as long, with 256 a short one 1.15
MULTIPLE = 64  # of the cache's size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotCache:
    """Keys and values of all slots, keys transposed as the matmul of a single query reads them (`UnstackedKVCache`).

    `layer` is the one that the next `attend` reads and writes. S is a multiple of `block`.
    """

    keys: Float[Array, "L B K H S"]
    values: Float[Array, "L B K S H"]
    layer: Int[Array, ""]
    block: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, config: Config, slots: int, context: int, dtype: jax.typing.DTypeLike) -> "SlotCache":
        """A cache of `slots` texts of at most `context` tokens.

        On a GPU the only block is the whole cache: reading it costs less than the loop, which waits for the host.
        """
        size = -(-context // MULTIPLE) * MULTIPLE
        block = min(CPU_BLOCK, size) if jax.default_backend() == "cpu" else size
        size = -(-size // block) * block
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads)
        keys, values = (
            jnp.zeros((*shape, config.head_dim, size), dtype),
            jnp.zeros((*shape, size, config.head_dim), dtype),
        )
        return cls(keys, values, jnp.zeros((), jnp.int32), block)

    def first_layer(self) -> "SlotCache":
        """The cache for the next forward pass."""
        return dataclasses.replace(self, layer=jnp.zeros((), jnp.int32))

    def attention(
        self, q: Float[Array, "R T N H"], positions: Int[Array, "R T"], slot: Int[Array, ""], longest: Int[Array, ""]
    ) -> Float[Array, "R T N H"]:
        """Attention of queries at `positions` in slots `slot`, `slot` + 1, ... to the cached tokens up to their own.

        `longest` is the largest position that counts; rows beyond it get an unspecified, finite result.
        """
        (R, T, N, H), K, block = q.shape, self.keys.shape[2], self.block
        q = (q * H**-0.5).reshape(R, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(R, K, -1, H)
        last = jnp.tile(positions, N // K)[:, None, :, None]  # position of each query, in the order of q

        def add_block(i, carry):
            top, total, out = carry
            keys = jax.lax.dynamic_slice(self.keys, (self.layer, slot, 0, 0, i * block), (1, R, K, H, block))[0]
            values = jax.lax.dynamic_slice(self.values, (self.layer, slot, 0, i * block, 0), (1, R, K, block, H))[0]
            scores = jnp.einsum("RKQH,RKHS->RKQS", q, keys, preferred_element_type=jnp.float32)
            scores = jnp.where(i * block + jnp.arange(block) <= last, scores, -jnp.inf)
            # Finite from the first block on, because every query sees the first token.
            new_top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
            weights, correction = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            total = total * correction + weights.sum(axis=-1, keepdims=True)
            new = jnp.einsum(
                "RKQS,RKSH->RKQH", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
            )
            return new_top, total, out * correction + new

        shape = (R, K, q.shape[2])
        carry = jnp.full((*shape, 1), -jnp.inf), jnp.zeros((*shape, 1)), jnp.zeros((*shape, H))
        if block == self.keys.shape[-1]:
            _, total, out = add_block(0, carry)
        else:
            _, total, out = jax.lax.fori_loop(0, longest // block + 1, add_block, carry)
        out = (out / total).reshape(R, K, N // K, T, H).transpose(0, 3, 1, 2, 4)
        return out.reshape(R, T, N, H).astype(q.dtype)


def next_token(length: Int[Array, "R"], active: Bool[Array, "R"]) -> Attend:
    """Attention of one new token in each of the first R slots; `length` tokens of each are in the cache before it.

    An inactive slot keeps its tokens: nothing is written to it.
    """
    position = jnp.where(active, length, 0)
    zero = jnp.zeros((), jnp.int32)

    def attend(q, k, v, cache: SlotCache):
        rows, at = jnp.arange(length.shape[0]), jnp.where(active, length, cache.keys.shape[-1])  # outside: not written
        keys = cache.keys.at[cache.layer, rows, :, :, at].set(k[:, 0].astype(cache.keys.dtype), mode="drop")
        values = cache.values.at[cache.layer, rows, :, at].set(v[:, 0].astype(cache.values.dtype), mode="drop")
        cache = dataclasses.replace(cache, keys=keys, values=values)
        out = cache.attention(q, position[:, None], zero, jnp.max(position))
        return out, dataclasses.replace(cache, layer=cache.layer + 1)

    return attend


def next_tokens(slot: Int[Array, ""], length: Int[Array, ""]) -> Attend:
    """Attention of T new tokens of one slot that holds `length` tokens; `length` + T is at most S."""

    def attend(q, k, v, cache: SlotCache):
        zero, positions = jnp.zeros((), jnp.int32), length + jnp.arange(q.shape[1])[None]
        k, v = (x.transpose(0, 2, 1, 3)[None].astype(cache.keys.dtype) for x in (k, v))
        keys = jax.lax.dynamic_update_slice(cache.keys, k.swapaxes(3, 4), (cache.layer, slot, zero, zero, length))
        values = jax.lax.dynamic_update_slice(cache.values, v, (cache.layer, slot, zero, length, zero))
        cache = dataclasses.replace(cache, keys=keys, values=values)
        out = cache.attention(q, positions, slot, positions[0, -1])
        return out, dataclasses.replace(cache, layer=cache.layer + 1)

    return attend
