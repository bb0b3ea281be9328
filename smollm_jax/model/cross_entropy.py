"""Cross-entropy over the vocabulary that never holds the logits of all tokens.

The float32 logits of 64 x 2048 tokens take 25.8 GB. Here tokens go through the head in chunks, and the gradients are
computed in the same pass, so the head costs three matmuls instead of four.

M tokens, D hidden, V vocab.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from smollm_jax.config.recipe import CHUNK_TOKENS, CPU_CHUNK_TOKENS
from smollm_jax.model.precision import blocked_matmul, wants_full_precision

EXACT_BLOCK = 1536  # vocabulary entries per block of a `blocked_matmul`


def linear_cross_entropy(
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "M"],
    chunk_tokens: int | None = None,
    operands: jax.typing.DTypeLike | None = None,
) -> Float[Array, ""]:
    """The sum over tokens of -log softmax(hidden @ head.T)[target], in at least float32; targets < 0 are ignored.

    It is a sum so that the caller divides once by the number of valid tokens: a mean of micro-batch means is wrong
    when their numbers of valid tokens differ (transformers#34191). The inputs of matmuls are rounded to `operands`
    (default: `hidden.dtype`); the gradient of `head` has head's dtype, so float32 master weights get a float32 sum
    over chunks.
    """
    chunk_tokens = chunk_tokens or (CPU_CHUNK_TOKENS if jax.default_backend() == "cpu" else CHUNK_TOKENS)
    return _linear_cross_entropy(hidden, head, targets, chunk_tokens, jnp.dtype(operands or hidden.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
@jax.named_scope("loss")
def _linear_cross_entropy(hidden, head, targets, chunk_tokens, operands):
    weight = head.astype(operands)

    def step(total, chunk):
        return total + _chunk_loss(weight, *chunk)[0], None

    chunks = _to_chunks(hidden, targets, chunk_tokens)
    return jax.lax.scan(step, jnp.zeros((), _acc_dtype(hidden.dtype)), chunks)[0]


@jax.named_scope("loss")
def _forward(hidden, head, targets, chunk_tokens, operands):
    weight = head.astype(operands)
    acc_dtype = _acc_dtype(hidden.dtype)

    def step(carry, chunk):
        total, head_gradient = carry
        h, target = chunk
        loss, logits, log_normalizer, valid = _chunk_loss(weight, h, target)
        probability = jnp.exp(logits - log_normalizer[:, None])
        d_logits = probability - (jnp.arange(weight.shape[0]) == target[:, None])
        d_logits = (d_logits * valid[:, None]).astype(operands)
        head_gradient += jnp.einsum("MV,MD->VD", d_logits, h.astype(operands), preferred_element_type=acc_dtype)
        # A sum over 49,152 terms: unblocked, its rounding error would exceed that of the rest of the backward pass.
        if wants_full_precision(operands):
            d_hidden = blocked_matmul(d_logits, weight, EXACT_BLOCK)
        else:
            d_hidden = jnp.matmul(d_logits, weight, preferred_element_type=h.dtype)
        return (total + loss, head_gradient), d_hidden

    zero = (jnp.zeros((), acc_dtype), jnp.zeros(weight.shape, acc_dtype))
    (total, head_gradient), hidden_gradient = jax.lax.scan(step, zero, _to_chunks(hidden, targets, chunk_tokens))
    hidden_gradient = hidden_gradient.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return total, (hidden_gradient, head_gradient.astype(head.dtype))


@jax.named_scope("loss")
def _backward(_chunk_tokens, _operands, gradients, cotangent):
    hidden_gradient, head_gradient = gradients
    # Scale in float32: 1 / tokens rounded to bfloat16 is up to 0.2 % off unless tokens is a power of two.
    scaled = (hidden_gradient.astype(cotangent.dtype) * cotangent).astype(hidden_gradient.dtype)
    return scaled, head_gradient * cotangent.astype(head_gradient.dtype), None


_linear_cross_entropy.defvjp(_forward, _backward)


def _chunk_loss(weight, h, target):
    """The summed loss of one chunk, and what its gradient needs: logits, log-normalizer, mask of valid tokens."""
    logits = jnp.einsum("MD,VD->MV", h.astype(weight.dtype), weight, preferred_element_type=_acc_dtype(h.dtype))
    log_normalizer = (jax.nn.logsumexp if jax.default_backend() == "cpu" else online_logsumexp)(logits, axis=-1)
    valid = target >= 0
    target_logit = jnp.take_along_axis(logits, jnp.where(valid, target, 0)[:, None], axis=-1)[:, 0]
    return jnp.sum(jnp.where(valid, log_normalizer - target_logit, 0.0)), logits, log_normalizer, valid


def online_logsumexp(x: Float[Array, "... V"], axis: int) -> Float[Array, "..."]:
    """logsumexp of finite numbers in one pass over memory: faster on a GPU, slower on a CPU.

    Source: Milakov and Gimelshein 2018, the online softmax.
    """

    def combine(a, b):
        (max_a, sum_a), (max_b, sum_b) = a, b
        correction = jnp.exp(-jnp.abs(max_a - max_b))
        total = jnp.where(max_a > max_b, sum_a + sum_b * correction, sum_a * correction + sum_b)
        return jnp.maximum(max_a, max_b), total

    identity = jnp.finfo(x.dtype).min, jnp.zeros((), x.dtype)
    largest, total = jax.lax.reduce((x, jnp.ones_like(x)), identity, combine, (axis % x.ndim,))
    return largest + jnp.log(total)


def _to_chunks(hidden, targets, chunk_tokens):
    """Hidden states `[C, m, D]` and targets `[C, m]` in C chunks of m tokens each; padding has targets < 0."""
    M = hidden.shape[0]
    chunks = -(-M // chunk_tokens)
    size = -(-M // chunks)
    padding = chunks * size - M
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(chunks, size, -1)
    return hidden, jnp.pad(targets, (0, padding), constant_values=-1).reshape(chunks, size)


def _acc_dtype(dtype):
    return jnp.promote_types(dtype, jnp.float32)
