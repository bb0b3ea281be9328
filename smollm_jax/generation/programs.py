"""The device programs of generation: prefill, the decode loop, and the state between two calls.

B rows, T prompt slots, V vocab.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from smollm_jax.config import Config
from smollm_jax.generation.quantized import Quantized
from smollm_jax.generation.sampling import Knobs, choose
from smollm_jax.generation.unrolled import Unrolled
from smollm_jax.model.attention import KVCache, UnstackedKVCache, cached, cached_unstacked
from smollm_jax.model.smollm import SmolLM

SMALLEST_BUCKET = 64  # prompt slots
SMALLEST_CACHE = 512  # slots; reading 512 costs 4 % of what reading SmolLM2-135M's weights does
SMALLEST_QUANTIZED_CACHE = 256  # of int8 weights 512 would cost 16 %
NO_TOKEN = -1  # what a row gives after its end
MOST_ALTERNATIVES = 20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """What one decoded token needs from those before it."""

    cache: KVCache | UnstackedKVCache
    start: Int[Array, "B"]  # the first slot that is no padding
    token: Int[Array, "B"]  # chosen last, not yet in the cache
    done: Bool[Array, "B"]
    count: Int[Array, "B"]  # tokens chosen so far
    seen: Bool[Array, "B V"]  # tokens in the prompt or the text


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """What a call gives: new tokens, and their log-probabilities where they were asked for."""

    ids: Any  # [B, n], NO_TOKEN after a row's end
    done: Any  # [B]
    logprobs: Any  # [B, n], under softmax of the bare logits; these three are None unless asked for
    likeliest: Any  # [B, n, M]
    likeliest_logprobs: Any  # [B, n, M]


def buckets(config: Config) -> list[int]:
    """The prompt and cache sizes that programs are compiled for: 64, 128, ... and the context itself."""
    context = config.max_position_embeddings
    sizes = [min(SMALLEST_BUCKET, context)]
    while sizes[-1] < context:
        sizes.append(2 * sizes[-1])
    return [*sizes[:-1], context]


@functools.partial(jax.jit, static_argnames="slots")
def prefill(
    model: SmolLM,
    tokens: Int[Array, "B T"],
    start: Int[Array, "B"],
    used: Int[Array, ""] | int | None = None,
    *,
    slots: int,
) -> tuple[KVCache, Float[Array, "B V"]]:
    """The keys and values of left-padded prompts in a cache of `slots`, and the logits of the next token.

    Prompts end before slot `used` (default: T).
    """
    B, T = tokens.shape
    used = jnp.asarray(T if used is None else used, jnp.int32)
    cache = KVCache.empty(model.config, B, slots, model.embed_tokens.dtype)
    positions = jnp.maximum(jnp.arange(T) - start[:, None], 0)
    hidden, cache = model.hidden_states(tokens, positions=positions, attend=cached(start, empty=True), cache=cache)
    last = jax.lax.dynamic_slice_in_dim(hidden, used - 1, 1, axis=1)
    # Slots from `used` on hold nothing of use: they are written again before anything sees them.
    return dataclasses.replace(cache.advance(0), length=used), model.logits(last)[:, 0]


@jax.jit
def unstack_cache(cache: KVCache) -> UnstackedKVCache:
    """The cache as a `Quantized` model decodes with it."""
    return UnstackedKVCache.from_stacked(cache)


@functools.partial(jax.jit, static_argnames="slots")
def grow(state: Decoding, *, slots: int) -> Decoding:
    """The same state with a cache of `slots`."""
    return dataclasses.replace(state, cache=state.cache.grow(slots))


@functools.partial(jax.jit, static_argnames=("greedy", "eos", "report"), donate_argnames="state")
def begin(
    state: Decoding, logits: Float[Array, "B V"], knobs: Knobs, *, greedy: bool, eos: tuple[int, ...], report: bool
) -> tuple[Decoding, Chosen]:
    """The state with the first token after a prefill, `n` = 1."""
    state, new = _step(state, logits, knobs, greedy, eos, report)
    return state, jax.tree.map(lambda x: x if x is new.done else x[:, None], new)


def _decode(
    model: SmolLM | Unrolled | Quantized,
    state: Decoding,
    knobs: Knobs,
    steps: Int[Array, ""] | int,
    *,
    most: int,
    greedy: bool,
    eos: tuple[int, ...],
    report: bool,
) -> tuple[Decoding, Chosen]:
    """Chooses `steps` of at most `most` tokens a row; stops early when every row has ended."""
    B, M = state.done.shape[0], min(MOST_ALTERNATIVES, model.config.vocab_size)
    ids = jnp.full((B, most), NO_TOKEN, jnp.int32)
    numbers = jnp.zeros((B, most), jnp.float32)
    many = jnp.zeros((B, most, M), jnp.int32), jnp.zeros((B, most, M), jnp.float32)
    out = Chosen(ids, state.done, *((numbers, *many) if report else (None, None, None)))
    attend = cached_unstacked if isinstance(model, Quantized) else cached

    def more(carry):
        i, state, _ = carry
        return (i < steps) & ~state.done.all()

    def step(carry):
        i, state, out = carry
        positions = (state.cache.length - state.start)[:, None]
        # advance(0): where the layers are laid out, each finds its place in the cache when the program is compiled.
        hidden, cache = model.hidden_states(
            state.token[:, None], positions=positions, attend=attend(state.start), cache=state.cache.advance(0)
        )
        state = dataclasses.replace(state, cache=cache.advance(1))
        state, new = _step(state, model.logits(hidden)[:, 0], knobs, greedy, eos, report)
        return i + 1, state, jax.tree.map(lambda all, x: x if all.ndim == 1 else all.at[:, i].set(x), out, new)

    _, state, out = jax.lax.while_loop(more, step, (jnp.zeros((), jnp.int32), state, out))
    return state, out


_compiled = functools.partial(jax.jit, static_argnames=("most", "greedy", "eos", "report"), donate_argnames="state")
decode = _compiled(_decode)
# XLA:CPU takes vectors of 256 bits where there are 512. With 512 a token of int8 weights, which are widened on the way
# into a product, takes two thirds of the time; one of float32 takes as long either way, and keeps its bits so.
decode_quantized = _compiled(_decode, compiler_options={"xla_cpu_prefer_vector_width": 512})


def _step(
    state: Decoding, logits: Float[Array, "B V"], knobs: Knobs, greedy: bool, eos: tuple[int, ...], report: bool
) -> tuple[Decoding, Chosen]:
    """The state with the token that these logits give, and that token of every row, `n` left out."""
    token = jnp.argmax(logits, axis=-1) if greedy else choose(logits, knobs, state.count, state.seen)
    token = token.astype(jnp.int32)
    wide = logits.astype(jnp.float32)
    reports = (None, None, None)
    if report:
        log_normalizer = jax.nn.logsumexp(wide, axis=-1, keepdims=True)
        best, which = jax.lax.top_k(wide, min(MOST_ALTERNATIVES, wide.shape[-1]))
        of_token = jnp.take_along_axis(wide, token[:, None], axis=-1)
        reports = ((of_token - log_normalizer)[:, 0], which, best - log_normalizer)
    ids = jnp.where(state.done, NO_TOKEN, token)
    done = state.done | jnp.isin(token, jnp.asarray(eos, jnp.int32)) if eos else state.done
    seen = state.seen if greedy else state.seen.at[jnp.arange(token.shape[0]), token].set(True)
    state = dataclasses.replace(state, token=token, done=done, count=state.count + 1, seen=seen)
    return state, Chosen(ids, done, *reports)
