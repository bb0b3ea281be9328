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
        return total + _chunk_losses(weight, *chunk)[0].sum(), None

    chunks = _to_chunks(hidden, targets, chunk_tokens)
    return jax.lax.scan(step, jnp.zeros((), _acc_dtype(hidden.dtype)), chunks)[0]


@jax.named_scope("loss")
def _forward(hidden, head, targets, chunk_tokens, operands):
    weight = head.astype(operands)
    acc_dtype = _acc_dtype(hidden.dtype)

    def step(carry, chunk):
        total, head_gradient = carry
        h, target = chunk
        losses, logits, log_normalizer, valid = _chunk_losses(weight, h, target)
        d_weight, d_hidden = _chunk_gradients(weight, h, target, logits, log_normalizer, valid)
        return (total + losses.sum(), head_gradient + d_weight), d_hidden

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


def linear_log_probs(
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "M"],
    chunk_tokens: int | None = None,
    operands: jax.typing.DTypeLike | None = None,
) -> Float[Array, "M"]:
    """log softmax(hidden @ head.T)[target] of each token, in at least float32; 0 where the target is < 0.

    For losses that are no plain sum over tokens: the weight of each token in the gradient is known only after the
    forward pass, so the backward pass computes the logits again, a chunk at a time, in four matmuls in all. Tokens
    without a target cost nothing: they are sorted behind the others, and only chunks with targets are computed.
    """
    chunk_tokens = chunk_tokens or (CPU_CHUNK_TOKENS if jax.default_backend() == "cpu" else CHUNK_TOKENS)
    order = jnp.argsort(targets < 0)  # stable
    dtype = jnp.dtype(operands or hidden.dtype)
    log_probs: Array = _linear_log_probs(hidden[order], head, targets[order], chunk_tokens, dtype)
    return jnp.zeros_like(log_probs).at[order].set(log_probs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
@jax.named_scope("loss")
def _linear_log_probs(hidden, head, targets, chunk_tokens, operands):
    weight = head.astype(operands)
    hiddens, chunk_targets = _to_chunks(hidden, targets, chunk_tokens)

    def step(i, log_probs):
        return log_probs.at[i].set(-_chunk_losses(weight, hiddens[i], chunk_targets[i])[0])

    zeros = jnp.zeros(chunk_targets.shape, _acc_dtype(hidden.dtype))
    return jax.lax.fori_loop(0, _chunks_with_targets(chunk_targets), step, zeros).reshape(-1)[: hidden.shape[0]]


def _log_probs_forward(hidden, head, targets, chunk_tokens, operands):
    return _linear_log_probs(hidden, head, targets, chunk_tokens, operands), (hidden, head, targets)


@jax.named_scope("loss")
def _log_probs_backward(chunk_tokens, operands, residuals, cotangent):
    hidden, head, targets = residuals
    weight = head.astype(operands)
    hiddens, chunk_targets = _to_chunks(hidden, targets, chunk_tokens)
    padding = chunk_targets.size - targets.size
    weights = jnp.pad(-cotangent, (0, padding)).reshape(chunk_targets.shape)

    def step(i, gradients):
        h, target = hiddens[i], chunk_targets[i]
        _, logits, log_normalizer, valid = _chunk_losses(weight, h, target)
        d_weight, d_hidden = _chunk_gradients(weight, h, target, logits, log_normalizer, valid * weights[i])
        return gradients[0] + d_weight, gradients[1].at[i].set(d_hidden)

    zeros = jnp.zeros(weight.shape, _acc_dtype(hidden.dtype)), jnp.zeros_like(hiddens)
    head_gradient, d_hidden = jax.lax.fori_loop(0, _chunks_with_targets(chunk_targets), step, zeros)
    return d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]], head_gradient.astype(head.dtype), None


_linear_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def _chunks_with_targets(chunk_targets):
    """How many of the chunks hold a target; the tokens with one come first."""
    return (chunk_targets[:, 0] >= 0).sum()


def _chunk_losses(weight, h, target):
    """The loss of each token of a chunk, and what the gradient needs: logits, log-normalizer, mask of valid tokens."""
    logits = jnp.einsum("MD,VD->MV", h.astype(weight.dtype), weight, preferred_element_type=_acc_dtype(h.dtype))
    log_normalizer = (jax.nn.logsumexp if jax.default_backend() == "cpu" else online_logsumexp)(logits, axis=-1)
    valid = target >= 0
    target_logit = jnp.take_along_axis(logits, jnp.where(valid, target, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(valid, log_normalizer - target_logit, 0.0), logits, log_normalizer, valid


def _chunk_gradients(weight, h, target, logits, log_normalizer, scale):
    """The gradients of a chunk's losses, each times its `scale`, for the head and the hidden states."""
    probability = jnp.exp(logits - log_normalizer[:, None])
    d_logits = probability - (jnp.arange(weight.shape[0]) == target[:, None])
    d_logits = (d_logits * scale[:, None]).astype(weight.dtype)
    d_weight = jnp.einsum("MV,MD->VD", d_logits, h.astype(weight.dtype), preferred_element_type=_acc_dtype(h.dtype))
    # A sum over 49,152 terms: unblocked, its rounding error would exceed that of the rest of the backward pass.
    if wants_full_precision(weight.dtype):
        return d_weight, blocked_matmul(d_logits, weight, EXACT_BLOCK)
    return d_weight, jnp.matmul(d_logits, weight, preferred_element_type=h.dtype)


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
