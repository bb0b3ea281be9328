"""Cross-entropy over the vocabulary that never holds the logits of all tokens.

64 x 2048 tokens of float32 logits are 25.8 GB. Here tokens go through the head in chunks, and the gradients are
computed in the same pass, so that the head costs three matrix products instead of four.

M tokens, D hidden, V vocab.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from smollm_jax.config.recipe import CHUNK_TOKENS, CPU_CHUNK_TOKENS
from smollm_jax.model.precision import exactly, in_blocks

EXACT_BLOCK = 1536  # vocabulary entries summed at once where products must be exact


def linear_cross_entropy(
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "M"],
    chunk_tokens: int | None = None,
    operands: jax.typing.DTypeLike | None = None,
) -> Float[Array, ""]:
    """The sum over tokens of -log softmax(hidden @ head.T)[target], in at least float32; a target < 0 counts nothing.

    A sum, so that the caller divides by all valid tokens once: a mean of micro-batch means is wrong when they differ
    in valid tokens (transformers#34191). Products multiply numbers of dtype `operands` (default: `hidden.dtype`); the
    gradient of `head` keeps head's dtype, so float32 master weights get a float32 sum over chunks.
    """
    chunk_tokens = chunk_tokens or (CPU_CHUNK_TOKENS if jax.default_backend() == "cpu" else CHUNK_TOKENS)
    return _linear_cross_entropy(hidden, head, targets, chunk_tokens, jnp.dtype(operands or hidden.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
@jax.named_scope("loss")
def _linear_cross_entropy(hidden, head, targets, chunk_tokens, operands):
    weight = head.astype(operands)

    def step(total, chunk):
        return total + _chunk(weight, *chunk)[0], None

    chunks = _split(hidden, targets, chunk_tokens)
    return jax.lax.scan(step, jnp.zeros((), _wide(hidden.dtype)), chunks)[0]


@jax.named_scope("loss")
def _forward(hidden, head, targets, chunk_tokens, operands):
    weight = head.astype(operands)
    wide = _wide(hidden.dtype)

    def step(carry, chunk):
        total, head_gradient = carry
        h, target = chunk
        loss, logits, log_normalizer, valid = _chunk(weight, h, target)
        probability = jnp.exp(logits - log_normalizer[:, None])
        error = probability - (jnp.arange(weight.shape[0]) == target[:, None])
        error = (error * valid[:, None]).astype(operands)
        head_gradient += jnp.einsum("MV,MD->VD", error, h.astype(operands), preferred_element_type=wide)
        # Over 49,152 terms, of which one sum would round away more than all that follows in the backward pass.
        if exactly(operands):
            back = in_blocks(error, weight, EXACT_BLOCK)
        else:
            back = jnp.matmul(error, weight, preferred_element_type=h.dtype)
        return (total + loss, head_gradient), back

    zero = (jnp.zeros((), wide), jnp.zeros(weight.shape, wide))
    (total, head_gradient), hidden_gradient = jax.lax.scan(step, zero, _split(hidden, targets, chunk_tokens))
    hidden_gradient = hidden_gradient.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return total, (hidden_gradient, head_gradient.astype(head.dtype))


@jax.named_scope("loss")
def _backward(_chunk_tokens, _operands, gradients, cotangent):
    hidden_gradient, head_gradient = gradients
    # Scaled wide: 1 / tokens rounded to bfloat16 is up to 0.2 % off where tokens is no power of two.
    scaled = (hidden_gradient.astype(cotangent.dtype) * cotangent).astype(hidden_gradient.dtype)
    return scaled, head_gradient * cotangent.astype(head_gradient.dtype), None


_linear_cross_entropy.defvjp(_forward, _backward)


def _chunk(weight, h, target):
    """The summed loss of one chunk, and what its gradient needs: logits, their log-normalizer, which tokens count."""
    logits = jnp.einsum("MD,VD->MV", h.astype(weight.dtype), weight, preferred_element_type=_wide(h.dtype))
    log_normalizer = (jax.nn.logsumexp if jax.default_backend() == "cpu" else logsumexp_in_one_pass)(logits, axis=-1)
    valid = target >= 0
    chosen = jnp.take_along_axis(logits, jnp.where(valid, target, 0)[:, None], axis=-1)[:, 0]
    return jnp.sum(jnp.where(valid, log_normalizer - chosen, 0.0)), logits, log_normalizer, valid


def logsumexp_in_one_pass(x: Float[Array, "... V"], axis: int) -> Float[Array, "..."]:
    """log(sum(exp(x))) of finite numbers along an axis, which a GPU reads once; a CPU takes longer for this one.

    Source: Milakov and Gimelshein 2018, the running softmax.
    """

    def add(one, other):
        (largest, total), (largest_too, total_too) = one, other
        less = jnp.exp(-jnp.abs(largest - largest_too))
        first = largest > largest_too
        total = jnp.where(first, total + total_too * less, total * less + total_too)
        return jnp.maximum(largest, largest_too), total

    nothing = jnp.finfo(x.dtype).min, jnp.zeros((), x.dtype)
    largest, total = jax.lax.reduce((x, jnp.ones_like(x)), nothing, add, (axis % x.ndim,))
    return largest + jnp.log(total)


def _split(hidden, targets, chunk_tokens):
    """Hidden states `[C, m, D]` and targets `[C, m]` in chunks of equal size m, padded with targets < 0."""
    M = hidden.shape[0]
    chunks = -(-M // chunk_tokens)
    size = -(-M // chunks)
    padding = chunks * size - M
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(chunks, size, -1)
    return hidden, jnp.pad(targets, (0, padding), constant_values=-1).reshape(chunks, size)


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)
