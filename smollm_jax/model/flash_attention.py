"""Causal attention block by block: never T x T scores, and only the blocks on or below the diagonal.

One scan visits every pair of a query block and a key block and keeps an online softmax. The only softmax statistic
saved for the backward pass is one log-normalizer per query; the scores of a block are recomputed from it.
Source: Dao et al. 2022 (FlashAttention), algorithm 1 and appendix B.4; Milakov and Gimelshein 2018 for the online
softmax.

B batch, T tokens, N query heads, K KV heads, G = N / K query heads per KV head, H head dim; n blocks of b tokens.
A query block is `[B K, G b, H]`: the query heads of one KV head are rows of one matmul.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

# Tokens per block. On a CPU 256 was the fastest of 64 to 512, forward and backward at T = 2,048; a GPU takes 512.
CPU_BLOCK, BLOCK = 256, 512
MASK_VALUE = -1e30  # finite: a fully masked row of a block then gives no NaN, and the online softmax discards it later


def block_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
    block: int | None = None,
    operands: jax.typing.DTypeLike | None = None,
) -> Float[Array, "B T N H"]:
    """Causal grouped-query attention, restricted to the token's own segment if `segment_ids` are given.

    Scores and sums are at least float32; the inputs of matmuls are rounded to `operands` (default: the dtype of q).
    Pairs of blocks that share no segment are skipped.
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
    acc_dtype, dtype, heads = jnp.promote_types(q.dtype, jnp.float32), q.dtype, k.shape[2]
    residuals = _query_blocks(q * q.shape[3] ** -0.5, heads, block), _key_blocks(k, block), _key_blocks(v, block)
    q, k, v = (x.astype(operands) for x in residuals)

    def step(carry, pair, mask):
        i, j = pair
        output, row_sum, row_max = (x[i] for x in carry)
        scores = _scores(q[i], k[j], mask, acc_dtype)
        new_max = jnp.maximum(row_max, scores.max(axis=-1, keepdims=True))
        correction, weights = jnp.exp(row_max - new_max), jnp.exp(scores - new_max)
        output = output * correction + _einsum("grs,gsh->grh", weights.astype(operands), v[j], acc_dtype)
        new = output, row_sum * correction + weights.sum(axis=-1, keepdims=True), new_max
        return tuple(_update_block(x, y, i) for x, y in zip(carry, new, strict=True))

    zeros = jnp.zeros((*q.shape[:-1], 1), acc_dtype)
    init = jnp.zeros(q.shape, acc_dtype), zeros, zeros + MASK_VALUE
    output, row_sum, row_max = _scan_block_pairs(step, init, segment_ids, block, q.shape)
    output = checkpoint_name(_from_blocks(output / row_sum, heads, block).astype(dtype), "attention")
    log_normalizer = checkpoint_name(row_max + jnp.log(row_sum), "attention")
    return output, (*residuals, output, log_normalizer, segment_ids)


@jax.named_scope("attention")
def _backward(block, operands, residuals, gradient):
    q, k, v, output, log_normalizer, segment_ids = residuals
    heads, scale = gradient.shape[2] // (q.shape[2] // block), q.shape[3] ** -0.5
    dtype, acc_dtype = q.dtype, log_normalizer.dtype
    q, k, v = (x.astype(operands) for x in (q, k, v))
    # The softmax backward subtracts the weighted mean of the weights' gradients, which is rowsum(output * gradient).
    mean = jnp.sum(output.astype(acc_dtype) * gradient.astype(acc_dtype), axis=-1, keepdims=True)
    gradient, mean = _query_blocks(gradient, heads, block).astype(operands), _query_blocks(mean, heads, block)
    # Accumulate dk and dv transposed, [H, b]: XLA:CPU is 2.5 times slower when both operands contract over their
    # leading axis.
    q_t, gradient_t = q.swapaxes(2, 3), gradient.swapaxes(2, 3)

    def step(carry, pair, mask):
        i, j = pair
        dq, dk, dv = carry
        weights = jnp.exp(_scores(q[i], k[j], mask, acc_dtype) - log_normalizer[i])
        dscores = weights * (_einsum("grh,gsh->grs", gradient[i], v[j], acc_dtype) - mean[i])
        weights, dscores = weights.astype(operands), dscores.astype(operands)
        dq = _update_block(dq, dq[i] + _einsum("grs,gsh->grh", dscores, k[j], acc_dtype), i)
        dk = _update_block(dk, dk[j] + _einsum("ghr,grs->ghs", q_t[i], dscores, acc_dtype), j)
        return dq, dk, _update_block(dv, dv[j] + _einsum("ghr,grs->ghs", gradient_t[i], weights, acc_dtype), j)

    init: Any = tuple(jnp.zeros(x.shape, acc_dtype) for x in (q, k.swapaxes(2, 3), v.swapaxes(2, 3)))
    dq, dk, dv = _scan_block_pairs(step, init, segment_ids, block, q.shape)
    dq = _from_blocks(dq * scale, heads, block)
    dk, dv = (_from_blocks(x.swapaxes(2, 3), heads, block) for x in (dk, dv))
    return dq.astype(dtype), dk.astype(dtype), dv.astype(dtype), None


_attention.defvjp(_forward, _backward)


def _scan_block_pairs(step, carry, segment_ids, block, shape):
    """Scans `step` over every pair of a query block and a key block on or below the diagonal; the final carry."""
    n, batch_heads, rows, _ = shape
    block_pairs = np.array([(i, j) for i in range(n) for j in range(i + 1)], np.int32)
    query_offset = jnp.tile(jnp.arange(block), rows // block)  # a query row's token offset in its block

    def causal(i, j):
        return (query_offset[:, None] >= jnp.arange(block)) | (i > j)

    if segment_ids is None:
        if n == 1:  # no loop: a train step then traces in a tenth less time
            return step(carry, (0, 0), causal(0, 0))
        return jax.lax.scan(lambda c, pair: (step(c, pair, causal(*pair)), None), carry, tuple(block_pairs.T))[0]
    B = len(segment_ids)
    key_segments = segment_ids.reshape(B, n, block).swapaxes(0, 1)  # [n, B, b]
    query_segments = jnp.tile(key_segments, (1, 1, rows // block))

    def within_segments(carry, pair):
        i, j = pair
        same = (query_segments[i][:, :, None] == key_segments[j][:, None, :]) & causal(i, j)
        mask = jnp.repeat(same, batch_heads // B, axis=0)
        return jax.lax.cond(same.any(), lambda c: step(c, pair, mask), lambda c: c, carry), None

    return jax.lax.scan(within_segments, carry, tuple(block_pairs.T))[0]


def _scores(q, k, mask, acc_dtype):
    return jnp.where(mask, _einsum("grh,gsh->grs", q, k, acc_dtype), MASK_VALUE)


def _einsum(subscripts, a, b, acc_dtype):
    return jnp.einsum(subscripts, a, b, preferred_element_type=acc_dtype)


def _update_block(blocks, x, i):
    # `.at[i].set(x)` would be a scatter.
    return jax.lax.dynamic_update_index_in_dim(blocks, x, i, 0)


def _query_blocks(x, heads, block):
    """`[B, T, N, H]` as blocks `[n, B K, G b, H]`."""
    B, T, N, H = x.shape
    x = x.reshape(B, T // block, block, heads, N // heads, H).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(T // block, B * heads, N // heads * block, H)


def _key_blocks(x, block):
    """`[B, T, K, H]` as blocks `[n, B K, b, H]`."""
    return _query_blocks(x, x.shape[2], block)


def _from_blocks(x, heads, block):
    """The inverse of `_query_blocks`."""
    n, batch_heads, rows, H = x.shape
    B, G = batch_heads // heads, rows // block
    x = x.reshape(n, B, heads, G, block, H).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, n * block, heads * G, H)
