"""The device programs of generation: prefill, the decode loop, and the state between two calls.

B rows, T prompt tokens, M alternatives, V vocab.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from smollm_jax.config import Config
from smollm_jax.generation.quantized import Quantized
from smollm_jax.generation.sampling import BatchedSampling, sample
from smollm_jax.generation.unrolled import Unrolled
from smollm_jax.model.attention import KVCache, UnstackedKVCache, cached, cached_unstacked
from smollm_jax.model.smollm import SmolLM

SMALLEST_BUCKET = 64  # prompt tokens
SMALLEST_CACHE = 512  # tokens; reading them costs 4 % of reading SmolLM2-135M's float32 weights
SMALLEST_QUANTIZED_CACHE = 256  # 512 would cost 16 % of reading int8 weights
PAD_ID = -1  # the token id of a row after its end
MAX_ALTERNATIVES = 20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of the decode loop between two tokens."""

    cache: KVCache | UnstackedKVCache
    start: Int[Array, "B"]  # the first cache slot that is not padding
    token: Int[Array, "B"]  # sampled last, not yet in the cache
    done: Bool[Array, "B"]
    count: Int[Array, "B"]  # tokens sampled so far
    seen: Bool[Array, "B V"]  # whether a token occurs in the prompt or the text


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeOutput:
    """The output of a device call of n steps. The last three fields are None without `return_logprobs`."""

    ids: Any  # [B, n], PAD_ID after a row's end
    done: Any  # [B]
    logprobs: Any  # [B, n], log-softmax of the raw logits
    top_ids: Any  # [B, n, M], likeliest first
    top_logprobs: Any  # [B, n, M]


def buckets(config: Config) -> list[int]:
    """The prompt and cache sizes that programs are compiled for: 64, 128, ... and the context itself."""
    context = config.max_position_embeddings
    sizes = [min(SMALLEST_BUCKET, context)]
    while sizes[-1] < context:
        sizes.append(2 * sizes[-1])
    return [*sizes[:-1], context]


@functools.partial(jax.jit, static_argnames="cache_size")
def prefill(
    model: SmolLM,
    tokens: Int[Array, "B T"],
    start: Int[Array, "B"],
    length: Int[Array, ""] | int | None = None,
    *,
    cache_size: int,
) -> tuple[KVCache, Float[Array, "B V"]]:
    """A cache of `cache_size` tokens per row with the keys and values of left-padded prompts, and the next logits.

    The prompts have `length` tokens (default: T), including the left padding; tokens from there on are ignored.
    """
    B, T = tokens.shape
    length = jnp.asarray(T if length is None else length, jnp.int32)
    cache = KVCache.empty(model.config, B, cache_size, model.embed_tokens.dtype)
    positions = jnp.maximum(jnp.arange(T) - start[:, None], 0)
    hidden, cache = model.hidden_states(tokens, positions=positions, attend=cached(start, empty=True), cache=cache)
    last = jax.lax.dynamic_slice_in_dim(hidden, length - 1, 1, axis=1)
    # Slots from `length` on hold the right padding; they are overwritten before they are attended to.
    return dataclasses.replace(cache.advance(0), length=length), model.logits(last)[:, 0]


@jax.jit
def unstack_cache(cache: KVCache) -> UnstackedKVCache:
    """The cache in the layout that a `Quantized` model decodes with."""
    return UnstackedKVCache.from_stacked(cache)


@functools.partial(jax.jit, static_argnames="cache_size")
def grow_cache(state: DecodeState, *, cache_size: int) -> DecodeState:
    """The state with its cache padded to `cache_size` tokens per row."""
    return dataclasses.replace(state, cache=state.cache.grow(cache_size))


@functools.partial(jax.jit, static_argnames=("greedy", "eos", "return_logprobs"), donate_argnames="state")
def sample_first(
    state: DecodeState,
    logits: Float[Array, "B V"],
    sampling: BatchedSampling,
    *,
    greedy: bool,
    eos: tuple[int, ...],
    return_logprobs: bool,
) -> tuple[DecodeState, DecodeOutput]:
    """The state and output after sampling the first token from the logits of a prefill; n = 1."""
    state, output = _step(state, logits, sampling, greedy, eos, return_logprobs)
    return state, jax.tree.map(lambda x: x if x is output.done else x[:, None], output)


def _decode(
    model: SmolLM | Unrolled | Quantized,
    state: DecodeState,
    sampling: BatchedSampling,
    steps: Int[Array, ""] | int,
    *,
    max_steps: int,
    greedy: bool,
    eos: tuple[int, ...],
    return_logprobs: bool,
) -> tuple[DecodeState, DecodeOutput]:
    """Decodes `steps` <= `max_steps` tokens per row, with n = `max_steps`; stops early when every row has ended."""
    B, M = state.done.shape[0], min(MAX_ALTERNATIVES, model.config.vocab_size)
    ids = jnp.full((B, max_steps), PAD_ID, jnp.int32)
    logprobs = jnp.zeros((B, max_steps), jnp.float32)
    top = jnp.zeros((B, max_steps, M), jnp.int32), jnp.zeros((B, max_steps, M), jnp.float32)
    output = DecodeOutput(ids, state.done, *((logprobs, *top) if return_logprobs else (None, None, None)))
    attend = cached_unstacked if isinstance(model, Quantized) else cached

    def unfinished(carry):
        i, state, _ = carry
        return (i < steps) & ~state.done.all()

    def step(carry):
        i, state, output = carry
        positions = (state.cache.length - state.start)[:, None]
        # advance(0) resets the layer index to a constant, which unrolled layers need at compile time.
        hidden, cache = model.hidden_states(
            state.token[:, None], positions=positions, attend=attend(state.start), cache=state.cache.advance(0)
        )
        state = dataclasses.replace(state, cache=cache.advance(1))
        state, new = _step(state, model.logits(hidden)[:, 0], sampling, greedy, eos, return_logprobs)
        return i + 1, state, jax.tree.map(lambda old, x: x if old.ndim == 1 else old.at[:, i].set(x), output, new)

    _, state, output = jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), state, output))
    return state, output


_compiled = functools.partial(
    jax.jit, static_argnames=("max_steps", "greedy", "eos", "return_logprobs"), donate_argnames="state"
)
decode = _compiled(_decode)
# XLA:CPU uses 256-bit vectors even where there are 512-bit ones. With 512 bits, decoding with int8 weights, which are
# converted to float32 inside the matmul, takes two thirds of the time. DecodeState in float32 gains nothing, and the
# default keeps its results bit-identical.
decode_quantized = _compiled(_decode, compiler_options={"xla_cpu_prefer_vector_width": 512})


def _step(
    state: DecodeState,
    logits: Float[Array, "B V"],
    sampling: BatchedSampling,
    greedy: bool,
    eos: tuple[int, ...],
    return_logprobs: bool,
) -> tuple[DecodeState, DecodeOutput]:
    """The state and output after sampling one token per row from these logits; the output has no step axis."""
    token = jnp.argmax(logits, axis=-1) if greedy else sample(logits, sampling, state.count, state.seen)
    token = token.astype(jnp.int32)
    logprobs = token_logprobs(logits, token) if return_logprobs else (None, None, None)
    ids = jnp.where(state.done, PAD_ID, token)
    done = state.done | jnp.isin(token, jnp.asarray(eos, jnp.int32)) if eos else state.done
    seen = state.seen if greedy else state.seen.at[jnp.arange(token.shape[0]), token].set(True)
    state = dataclasses.replace(state, token=token, done=done, count=state.count + 1, seen=seen)
    return state, DecodeOutput(ids, done, *logprobs)


def token_logprobs(
    logits: Float[Array, "B V"], token: Int[Array, "B"]
) -> tuple[Float[Array, "B"], Int[Array, "B M"], Float[Array, "B M"]]:
    """The log-probability of each row's token, and the likeliest tokens with theirs."""
    logits = logits.astype(jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    top_logits, top_ids = jax.lax.top_k(logits, min(MAX_ALTERNATIVES, logits.shape[-1]))
    token_logit = jnp.take_along_axis(logits, token[:, None], axis=-1)
    return (token_logit - log_normalizer)[:, 0], top_ids, top_logits - log_normalizer
