"""Text continued by a model: one prefill of the prompts, then a decode loop that stays on the device.

Prompts of different lengths are padded on the left; padding is masked by position, never by a token id, because the
base model has no pad token.

B prompts, T prompt slots, V vocab.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from smollm_jax.attention import KVCache, cached
from smollm_jax.errors import UsageError
from smollm_jax.model import SmolLM

SMALLEST_BUCKET = 32  # prompt slots; buckets double, so that lengths share compiled programs
NO_TOKEN = -1  # what a row gives after its end


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy at temperature 0, else from the kept part of the distribution."""

    temperature: float = 0.0
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # keeps the most likely tokens up to this total
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k < 0:
            raise UsageError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {self.top_p}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """What one decoded token needs from those before it."""

    cache: KVCache
    start: Int[Array, "B"]  # the first slot that is no padding
    logits: Float[Array, "B V"]  # of the token to choose next
    done: Bool[Array, "B"]
    count: Int[Array, ""]  # tokens chosen so far


def generate(
    model: SmolLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # frozen
    eos_token_ids: Sequence[int] = (),
    tokens_per_call: int = 8,
) -> Iterator[np.ndarray]:
    """Yields new tokens `[B, n]` as they come, an ended row's as `NO_TOKEN`; eos itself is given too.

    Raises `UsageError` for an empty prompt, a token id outside the vocabulary, and a prompt that does not fit the
    context together with `max_new_tokens`.
    """
    config = model.config
    longest = max((len(prompt) for prompt in prompts), default=0)
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise UsageError("a prompt must have at least one token")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if longest + max_new_tokens > config.max_position_embeddings:
        raise UsageError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of "
            f"{config.max_position_embeddings}"
        )
    if wrong := [t for prompt in prompts for t in prompt if not 0 <= t < config.vocab_size]:
        raise UsageError(f"token ids {wrong[:5]} are outside the vocabulary of {config.vocab_size}")
    bucket = max(SMALLEST_BUCKET, 1 << (longest - 1).bit_length())
    decoded = -(-max_new_tokens // tokens_per_call) * tokens_per_call
    slots = bucket + -(-decoded // 64) * 64  # rounded, so that lengths share compiled programs
    tokens = np.zeros((len(prompts), bucket), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[bucket - len(prompt) :] = prompt
    start = jnp.asarray([bucket - len(prompt) for prompt in prompts], jnp.int32)
    state = prefill(model, jnp.asarray(tokens), start, slots=slots)
    numbers = (sampling.temperature, sampling.top_k, sampling.top_p)
    key = jax.random.key(sampling.seed)
    remaining = max_new_tokens
    while remaining > 0:
        state, new = decode(
            model,
            state,
            key,
            numbers,
            steps=tokens_per_call,
            greedy=sampling.temperature == 0,
            eos=tuple(eos_token_ids),
        )
        # The last call may decode past what was asked for; those tokens are cut, not shown.
        yield np.asarray(new)[:, :remaining]
        remaining -= tokens_per_call
        if bool(state.done.all()):
            return


@functools.partial(jax.jit, static_argnames="slots")
def prefill(model: SmolLM, tokens: Int[Array, "B T"], start: Int[Array, "B"], *, slots: int) -> Decoding:
    """Runs left-padded prompts through the model and leaves their keys and values in a cache of `slots`."""
    B, T = tokens.shape
    cache = KVCache.empty(model.config, B, slots, model.embed_tokens.dtype)
    positions = jnp.maximum(jnp.arange(T) - start[:, None], 0)
    hidden, cache = model.hidden_states(tokens, positions=positions, attend=cached(start), memory=cache)
    logits = model.logits(hidden[:, -1:])[:, 0]
    return Decoding(cache.advance(T), start, logits, jnp.zeros(B, bool), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("steps", "greedy", "eos"), donate_argnames="state")
def decode(
    model: SmolLM,
    state: Decoding,
    key: Key[Array, ""],
    numbers: tuple[Any, Any, Any],
    *,
    steps: int,
    greedy: bool,
    eos: tuple[int, ...],
) -> tuple[Decoding, Int[Array, "B steps"]]:
    """Chooses up to `steps` tokens a row; stops early when every row has ended."""
    new = jnp.full((state.done.shape[0], steps), NO_TOKEN, jnp.int32)

    def more(carry):
        i, state, _ = carry
        return (i < steps) & ~state.done.all()

    def step(carry):
        i, state, new = carry
        noise = jax.random.fold_in(key, state.count)
        token = jnp.argmax(state.logits, axis=-1) if greedy else sample(state.logits, noise, *numbers)
        token = token.astype(jnp.int32)
        new = new.at[:, i].set(jnp.where(state.done, NO_TOKEN, token))
        done = state.done | jnp.isin(token, jnp.asarray(eos, jnp.int32)) if eos else state.done
        positions = (state.cache.length - state.start)[:, None]
        hidden, cache = model.hidden_states(
            token[:, None], positions=positions, attend=cached(state.start), memory=state.cache
        )
        state = Decoding(cache.advance(1), state.start, model.logits(hidden)[:, 0], done, state.count + 1)
        return i + 1, state, new

    _, state, new = jax.lax.while_loop(more, step, (jnp.zeros((), jnp.int32), state, new))
    return state, new


def sample(
    logits: Float[Array, "B V"], key: Key[Array, ""], temperature: Any, top_k: Any, top_p: Any
) -> Int[Array, "B"]:
    """Token ids drawn from softmax(logits / temperature), cut to the top_k tokens and then to top_p of their mass.

    Every row draws with the same noise, so that a prompt's text does not depend on what else is in the batch.
    Source: Holtzman et al. 2020 for top-p; the token that crosses top_p is kept.
    """
    scaled = logits / temperature
    descending = jnp.sort(scaled, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])
    kept = (top_k == 0) | (rank < top_k)
    probability = jax.nn.softmax(jnp.where(kept, descending, -jnp.inf), axis=-1)
    kept &= jnp.cumsum(probability, axis=-1) - probability < top_p
    threshold = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    noise = jax.random.gumbel(key, logits.shape[-1:], logits.dtype)
    return jnp.argmax(jnp.where(scaled >= threshold, scaled + noise, -jnp.inf), axis=-1)
