"""Causal attention block by block: never T x T scores, and only the blocks on or below the diagonal.

Each step of one scan takes a block of queries and a block of keys, keeps a running softmax, and moves on; the backward
pass keeps one number a query, the logarithm of its softmax's sum, and computes a block's scores again from it.
Source: Dao et al. 2022 (FlashAttention), algorithm 1 and appendix B.4; Milakov and Gimelshein 2018 for the running
softmax.

B batch, T tokens, N query heads, K KV heads, G = N / K query heads per KV head, H head dim; n blocks of b tokens.
A block of queries is `[B K, G b, H]`: the query heads of one KV head are rows of one product.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

# Tokens a block: on a CPU 256 measured best of 64 to 512, forward and backward at T = 2,048; elsewhere few large steps.
CPU_BLOCK, BLOCK = 256, 512
HIDDEN = -1e30  # finite, so that a block without one visible key gives no NaN; the running softmax forgets it


def block_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
    block: int | None = None,
    operands: jax.typing.DTypeLike | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention of every token to itself and the tokens before it, within its segment if there are any.

    Scores and sums are at least float32, products multiply numbers of dtype `operands` (default: the inputs'). Blocks
    of queries and keys without a segment in common are left out.
    """
    T = q.shape[1]
    block = min(block or (CPU_BLOCK if jax.default_backend() == "cpu" else BLOCK), T)
    padding = -T % block  # comes last, so no real query sees it
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)), mode="edge")
    out: Any = _attention(q, k, v, segment_ids, block, jnp.dtype(operands or q.dtype))
    return out[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, segment_ids, block, operands):
    return _forward(q, k, v, segment_ids, block, operands)[0]


def _forward(q, k, v, segment_ids, block, operands):
    wide, dtype, heads = jnp.promote_types(q.dtype, jnp.float32), q.dtype, k.shape[2]
    kept = _queries(q * q.shape[3] ** -0.5, heads, block), _keys(k, block), _keys(v, block)
    q, k, v = (x.astype(operands) for x in kept)

    def step(carry, pair, visible):
        i, j = pair
        output, total, largest = (x[i] for x in carry)
        scores = _scores(q[i], k[j], visible, wide)
        larger = jnp.maximum(largest, scores.max(axis=-1, keepdims=True))
        forget, weights = jnp.exp(largest - larger), jnp.exp(scores - larger)
        output = output * forget + _product("grs,gsh->grh", weights.astype(operands), v[j], wide)
        new = output, total * forget + weights.sum(axis=-1, keepdims=True), larger
        return tuple(_put(x, y, i) for x, y in zip(carry, new, strict=True))

    column = jnp.zeros((*q.shape[:-1], 1), wide)
    start = jnp.zeros(q.shape, wide), column, column + HIDDEN
    output, total, largest = _over_pairs(step, start, segment_ids, block, q.shape)
    output = checkpoint_name(_tokens(output / total, heads, block).astype(dtype), "attention")
    log_normalizer = checkpoint_name(largest + jnp.log(total), "attention")
    return output, (*kept, output, log_normalizer, segment_ids)


@jax.named_scope("attention")
def _backward(block, operands, kept, gradient):
    q, k, v, output, log_normalizer, segment_ids = kept
    heads, scale = gradient.shape[2] // (q.shape[2] // block), q.shape[3] ** -0.5
    dtype, wide = q.dtype, log_normalizer.dtype
    q, k, v = (x.astype(operands) for x in (q, k, v))
    # The derivative of softmax takes from each weight's gradient their weighted mean, which is output x gradient.
    mean = jnp.sum(output.astype(wide) * gradient.astype(wide), axis=-1, keepdims=True)
    gradient, mean = _queries(gradient, heads, block).astype(operands), _queries(mean, heads, block)
    # dk and dv are summed lying down, [H, b], from queries turned once: XLA:CPU takes 2.5 times as long for a product
    # over the rows of both its sides.
    turned, gradient_turned = q.swapaxes(2, 3), gradient.swapaxes(2, 3)

    def step(carry, pair, visible):
        i, j = pair
        dq, dk, dv = carry
        weights = jnp.exp(_scores(q[i], k[j], visible, wide) - log_normalizer[i])
        dscores = weights * (_product("grh,gsh->grs", gradient[i], v[j], wide) - mean[i])
        weights, dscores = weights.astype(operands), dscores.astype(operands)
        dq = _put(dq, dq[i] + _product("grs,gsh->grh", dscores, k[j], wide), i)
        dk = _put(dk, dk[j] + _product("ghr,grs->ghs", turned[i], dscores, wide), j)
        return dq, dk, _put(dv, dv[j] + _product("ghr,grs->ghs", gradient_turned[i], weights, wide), j)

    start: Any = tuple(jnp.zeros(x.shape, wide) for x in (q, k.swapaxes(2, 3), v.swapaxes(2, 3)))
    dq, dk, dv = _over_pairs(step, start, segment_ids, block, q.shape)
    dq = _tokens(dq * scale, heads, block)
    dk, dv = (_tokens(x.swapaxes(2, 3), heads, block) for x in (dk, dv))
    return dq.astype(dtype), dk.astype(dtype), dv.astype(dtype), None


_attention.defvjp(_forward, _backward)


def _over_pairs(step, carry, segment_ids, block, shape):
    """`carry` after `step` of every pair of a block of queries and one of keys that it may see."""
    n, groups, rows, _ = shape
    pairs = np.array([(i, j) for i in range(n) for j in range(i + 1)], np.int32)
    place = jnp.tile(jnp.arange(block), rows // block)  # of a row within its block

    def causal(i, j):
        return (place[:, None] >= jnp.arange(block)) | (i > j)

    if segment_ids is None:
        if n == 1:  # the same without a loop: a step is traced in a tenth less time
            return step(carry, (0, 0), causal(0, 0))
        return jax.lax.scan(lambda c, pair: (step(c, pair, causal(*pair)), None), carry, tuple(pairs.T))[0]
    B = len(segment_ids)
    of_keys = segment_ids.reshape(B, n, block).swapaxes(0, 1)  # [n, B, b]
    of_queries = jnp.tile(of_keys, (1, 1, rows // block))

    def within_segments(carry, pair):
        i, j = pair
        same = (of_queries[i][:, :, None] == of_keys[j][:, None, :]) & causal(i, j)
        visible = jnp.repeat(same, groups // B, axis=0)
        return jax.lax.cond(same.any(), lambda c: step(c, pair, visible), lambda c: c, carry), None

    return jax.lax.scan(within_segments, carry, tuple(pairs.T))[0]


def _scores(q, k, visible, wide):
    return jnp.where(visible, _product("grh,gsh->grs", q, k, wide), HIDDEN)


def _product(subscripts, a, b, wide):
    return jnp.einsum(subscripts, a, b, preferred_element_type=wide)


def _put(blocks, x, i):
    # Not `.at[i].set(x)`, a scatter.
    return jax.lax.dynamic_update_index_in_dim(blocks, x, i, 0)


def _queries(x, heads, block):
    """`[B, T, N, H]` as blocks `[n, B K, G b, H]`."""
    B, T, N, H = x.shape
    x = x.reshape(B, T // block, block, heads, N // heads, H).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(T // block, B * heads, N // heads * block, H)


def _keys(x, block):
    """`[B, T, K, H]` as blocks `[n, B K, b, H]`."""
    return _queries(x, x.shape[2], block)


def _tokens(x, heads, block):
    """The inverse of `_queries`."""
    n, groups, rows, H = x.shape
    B, G = groups // heads, rows // block
    x = x.reshape(n, B, heads, G, block, H).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, n * block, heads * G, H)
