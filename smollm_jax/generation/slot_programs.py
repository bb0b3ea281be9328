"""The device programs of `slots`: read a part of a prompt into a slot, begin its text, decode all slots.

B slots, R slots of a call, T prompt tokens, N tokens of a call, M alternatives, V vocab, W words of 32 bits for V.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from smollm_jax.config import Config
from smollm_jax.generation.programs import MAX_ALTERNATIVES, PAD_ID, DecodeOutput, token_logprobs
from smollm_jax.generation.quantized import Quantized
from smollm_jax.generation.sampling import GREEDY, BatchedSampling, sample
from smollm_jax.generation.unrolled import Unrolled
from smollm_jax.model.slot_cache import SlotCache, next_token, next_tokens
from smollm_jax.model.smollm import SmolLM

CHUNK_SIZES = (64, 128, 256, 512)  # prompt tokens; running texts wait while the largest is computed
LOGITS_TOKENS = 32  # prompt tokens whose logits are in memory at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotSettings:
    """How each slot's tokens are chosen: `Sampling`, after what OpenAI's API adds to the logits."""

    sampling: BatchedSampling
    bias: Float[Array, "B V"]  # added to the logits
    frequency_penalty: Float[Array, "B"]  # subtracted for every time that the text has the token
    presence_penalty: Float[Array, "B"]  # subtracted once if the text has it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotState:
    """The texts of all slots between two calls."""

    length: Int[Array, "B"]  # tokens in the cache
    token: Int[Array, "B"]  # sampled last, not yet in the cache
    remaining: Int[Array, "B"]  # tokens that may still be sampled; 0 for a slot without a text
    count: Int[Array, "B"]  # tokens sampled so far
    seen: Bool[Array, "B V"]  # whether a token occurs in the prompt or the text
    counts: Int[Array, "B V"]  # how often a token occurs in the text
    settings: SlotSettings

    @classmethod
    def empty(cls, config: Config, slots: int) -> "SlotState":
        """No slot has a text."""
        numbers, zeros, table = jnp.zeros(slots, jnp.int32), jnp.zeros(slots), (slots, config.vocab_size)
        settings = SlotSettings(BatchedSampling.stack([GREEDY] * slots), jnp.zeros(table), zeros, zeros)
        seen, counts = jnp.zeros(table, bool), jnp.zeros(table, jnp.int32)
        state = cls(numbers, numbers, numbers, numbers, seen, counts, settings)
        return jax.tree.map(jnp.copy, state)  # every buffer is donated once


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(
    model: SmolLM,
    cache: SlotCache,
    slot: Int[Array, ""],
    length: Int[Array, ""],
    tokens: Int[Array, "T"],
    count: Int[Array, ""],
    targets: Int[Array, "T"],
    want_logprobs: Bool[Array, ""],
) -> tuple[SlotCache, Float[Array, "1 V"], tuple[Float[Array, "T"], Int[Array, "T M"], Float[Array, "T M"]]]:
    """Adds `count` <= T prompt tokens to a slot that holds `length`; the logits after the last one.

    Also, if wanted, the log-probability of each of `targets`, the tokens that follow, and the likeliest ones there.
    """
    T = tokens.shape[0]
    hidden, cache = model.hidden_states(
        tokens[None],
        positions=(length + jnp.arange(T))[None],
        attend=next_tokens(slot, length),
        cache=cache.first_layer(),
    )
    last = jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)

    def logprobs_of(part):
        h, target = part
        return token_logprobs(model.logits(h[None])[0], target)

    def all_logprobs():
        parts = hidden[0].reshape(-1, LOGITS_TOKENS, hidden.shape[-1]), targets.reshape(-1, LOGITS_TOKENS)
        return jax.tree.map(lambda x: x.reshape(T, *x.shape[2:]), jax.lax.map(logprobs_of, parts))

    shapes = jax.eval_shape(all_logprobs)
    no_logprobs = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    logprobs = jax.lax.cond(want_logprobs, all_logprobs, no_logprobs)
    return cache.first_layer(), model.logits(last)[:, 0], logprobs


@functools.partial(jax.jit, donate_argnames="cache")
def copy_slot(cache: SlotCache, source: Int[Array, ""], target: Int[Array, ""]) -> SlotCache:
    """The cache with the tokens of one slot in another one, too."""

    def copied(x: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, jax.lax.dynamic_slice_in_dim(x, source, 1, 1), target, 1)

    return dataclasses.replace(cache, keys=copied(cache.keys), values=copied(cache.values))


@functools.partial(jax.jit, static_argnames="eos", donate_argnames="state")
def begin(
    state: SlotState,
    slot: Int[Array, ""],
    logits: Float[Array, "1 V"],
    text: SlotState,
    allowed: Int[Array, "1 W"],
    *,
    eos: tuple[int, ...],
) -> tuple[SlotState, DecodeOutput]:
    """Puts the state of a text of one row into a slot, and samples its first token; n = 1."""
    text, output = _sample(text, logits, jnp.ones(1, bool), allowed, jnp.ones((), bool), eos)
    state = jax.tree.map(lambda rows, row: jax.lax.dynamic_update_slice_in_dim(rows, row, slot, 0), state, text)
    return state, jax.tree.map(lambda x: x if x is output.done else x[:, None], output)


def _decode(
    model: Unrolled | Quantized,
    cache: SlotCache,
    state: SlotState,
    running: Bool[Array, "R"],
    allowed: Int[Array, "R W"],
    steps: Int[Array, ""] | int,
    want_logprobs: Bool[Array, ""],
    *,
    max_steps: int,
    eos: tuple[int, ...],
) -> tuple[SlotCache, SlotState, DecodeOutput]:
    """Decodes `steps` <= `max_steps` tokens in each of the first R slots that is running, with n = `max_steps`.

    Nothing of the other slots changes. It stops early when every text has ended.
    """
    R, M = running.shape[0], min(MAX_ALTERNATIVES, model.config.vocab_size)
    rows = jax.tree.map(lambda x: x[:R], state)
    ids, numbers = jnp.full((R, max_steps), PAD_ID, jnp.int32), jnp.zeros((R, max_steps), jnp.float32)
    top = jnp.zeros((R, max_steps, M), jnp.int32), jnp.zeros((R, max_steps, M), jnp.float32)
    output = DecodeOutput(ids, ~running, numbers, *top)

    def unfinished(carry):
        i, _, rows, _ = carry
        return (i < steps) & jnp.any(running & (rows.remaining > 0))

    def step(carry):
        i, cache, rows, output = carry
        active = running & (rows.remaining > 0)
        hidden, cache = model.hidden_states(
            rows.token[:, None],
            positions=rows.length[:, None],
            attend=next_token(rows.length, active),
            cache=cache.first_layer(),
        )
        rows = dataclasses.replace(rows, length=rows.length + active)
        rows, new = _sample(rows, model.logits(hidden)[:, 0], active, allowed, want_logprobs, eos)
        output = jax.tree.map(lambda old, x: x if old.ndim == 1 else old.at[:, i].set(x), output, new)
        return i + 1, cache.first_layer(), rows, output

    _, cache, rows, output = jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), cache, rows, output))
    return cache, jax.tree.map(lambda old, new: old.at[:R].set(new), state, rows), output


_compiled = functools.partial(jax.jit, static_argnames=("max_steps", "eos"), donate_argnames=("cache", "state"))
decode = _compiled(_decode)
decode_quantized = _compiled(_decode, compiler_options={"xla_cpu_prefer_vector_width": 512})  # see `programs`


def _sample(
    rows: SlotState,
    logits: Float[Array, "R V"],
    active: Bool[Array, "R"],
    allowed: Int[Array, "R W"],
    want_logprobs: Bool[Array, ""],
    eos: tuple[int, ...],
) -> tuple[SlotState, DecodeOutput]:
    """The state after sampling a token in each active row; the output has no step axis.

    `allowed` has a bit for each token that may follow; log-probabilities are those of the logits themselves.
    """
    settings, R = rows.settings, logits.shape[0]
    frequency, presence = settings.frequency_penalty[:, None], settings.presence_penalty[:, None]
    adjusted = logits + settings.bias - frequency * rows.counts - presence * (rows.counts > 0)
    adjusted = jnp.where(unpacked(allowed, logits.shape[-1]), adjusted, -jnp.inf)
    sampling = settings.sampling
    is_greedy = (sampling.temperature == 0) & (sampling.repetition_penalty == 1)
    token = jax.lax.cond(
        jnp.all(is_greedy | ~active),
        lambda: jnp.argmax(adjusted, axis=-1).astype(jnp.int32),
        lambda: sample(adjusted, sampling, rows.count, rows.seen),
    )
    shapes = jax.eval_shape(token_logprobs, logits, token)
    no_logprobs = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    logprobs = jax.lax.cond(want_logprobs, lambda: token_logprobs(logits, token), no_logprobs)
    ended = jnp.isin(token, jnp.asarray(eos, jnp.int32)) if eos else jnp.zeros(R, bool)
    remaining = jnp.where(active, jnp.where(ended, 0, rows.remaining - 1), rows.remaining)
    index = jnp.arange(R), token
    rows = dataclasses.replace(
        rows,
        token=jnp.where(active, token, rows.token),
        remaining=remaining,
        count=rows.count + active,
        seen=rows.seen.at[index].max(active),
        counts=rows.counts.at[index].add(active.astype(jnp.int32)),
    )
    return rows, DecodeOutput(jnp.where(active, token, PAD_ID), remaining == 0, *logprobs)


def unpacked(bits: Int[Array, "R W"], count: int) -> Bool[Array, "R {count}"]:
    """The first `count` bits of each row, lowest bit of a word first."""
    return ((bits[:, :, None] >> jnp.arange(32)) & 1).reshape(bits.shape[0], -1)[:, :count].astype(bool)


def chunk_sizes(cache: SlotCache) -> list[int]:
    """The numbers of prompt tokens that `prefill` is compiled for: 64, 128, 256 and 512, as far as they fit."""
    return [size for size in CHUNK_SIZES if size <= cache.keys.shape[-1]]


def row_counts(slots: int) -> list[int]:
    """The numbers of slots that `decode` is compiled for: 1, 4, 16, ... and all of them."""
    counts = [1]
    while counts[-1] < slots:
        counts.append(min(4 * counts[-1], slots))
    return counts
