"""Text continued by a model: one prefill of the prompts, then a decode loop that stays on the device.

Prompts of different lengths are padded on the left; padding is masked by position, never by a token id, because the
base model has no pad token. Programs are compiled per bucket: prompts are filled up (on the right, where nothing
looks) to 64, 128, ... slots, the cache has as many as a bucket and doubles when it is full, and the rows of a batch
are filled up to a power of two. So a context of 8,192 needs at most 8 prefill programs a batch size.

B rows, T prompt slots, V vocab.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from smollm_jax.attention import KVCache, LayerCaches, cached, cached_by_layer
from smollm_jax.config import Config, shown
from smollm_jax.errors import UsageError
from smollm_jax.model import SmolLM
from smollm_jax.quantized import Quantized
from smollm_jax.sampling import GREEDY, Knobs, Sampling, choose
from smollm_jax.unrolled import Unrolled

SMALLEST_BUCKET = 64  # prompt slots
SMALLEST_CACHE = 512  # slots; reading 512 costs 4 % of what reading SmolLM2-135M's weights does
SMALLEST_QUANTIZED_CACHE = 256  # of int8 weights 512 would cost 16 %
NO_TOKEN = -1  # what a row gives after its end
MOST_ALTERNATIVES = 20
# A call's fixed cost is far below a token's on a CPU (0.1 against 15 ms); a GPU gains from a few tokens a call.
TOKENS_PER_CALL = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """What one decoded token needs from those before it."""

    cache: KVCache | LayerCaches
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


def generate(
    model: SmolLM | Unrolled | Quantized,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    eos_token_ids: Sequence[int] = (),
    tokens_per_call: int = TOKENS_PER_CALL,
) -> Iterator[np.ndarray]:
    """Yields new tokens `[B, n]` as they come, an ended row's as `NO_TOKEN`; eos itself is given too.

    Raises `UsageError` for an empty prompt, a token id outside the vocabulary, and a prompt that does not fit the
    context together with `max_new_tokens`.
    """
    check(model.config, prompts, max_new_tokens)
    for chosen in run(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        samplings=[sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling,
        eos_token_ids=eos_token_ids,
        tokens_per_call=tokens_per_call,
    ):
        yield np.asarray(chosen.ids)


def check(config: Config, prompts: Any, max_new_tokens: Any, *, slide: bool = False) -> None:
    """Raises `UsageError` for what `run` cannot continue."""

    def whole(value: Any) -> bool:
        return isinstance(value, int | np.integer) and not isinstance(value, bool)

    right = False
    with contextlib.suppress(TypeError):  # one prompt, or none at all
        right = all(whole(token) for prompt in prompts for token in prompt)
    if isinstance(prompts, str) or not right:
        raise UsageError(f"prompts must be sequences of token ids, one for each text, got {shown(prompts)}")
    if not len(prompts) or min(len(prompt) for prompt in prompts) == 0:
        raise UsageError("a prompt must have at least one token")
    if not whole(max_new_tokens) or max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be an integer of at least 1, got {shown(max_new_tokens)}")
    if wrong := [int(t) for prompt in prompts for t in prompt if not 0 <= t < config.vocab_size]:
        raise UsageError(f"token ids {wrong[:5]} are outside the vocabulary of {config.vocab_size}")
    longest = max(len(prompt) for prompt in prompts)
    if not slide and longest + max_new_tokens > config.max_position_embeddings:
        raise UsageError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of "
            f"{config.max_position_embeddings}"
        )


def run(
    model: SmolLM | Unrolled | Quantized,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    samplings: Sequence[Sampling],
    eos_token_ids: Sequence[int] = (),
    tokens_per_call: int = TOKENS_PER_CALL,
    report: bool = False,
    slide: bool = False,
) -> Generator[Chosen, None, None]:
    """Yields what each device call chose, as NumPy arrays, until every row has ended; arguments as `check` wants them.

    The next call is under way before the last one's tokens are read, so closing the iterator leaves at most one call
    to end. With `slide` a row whose context is full goes on from the last half of its tokens, as from a fresh prompt.
    """
    config = model.config
    context, B = config.max_position_embeddings, len(prompts)
    rows = 1 << (B - 1).bit_length()
    texts = [list(map(int, prompt)) for prompt in prompts]  # all tokens of a row
    windows = [_window(text, context) for text in texts]  # those that the row still sees
    knobs = Knobs.of([*samplings, *[GREEDY] * (rows - B)])
    options: dict[str, Any] = {
        "greedy": all(sampling.is_greedy for sampling in samplings),
        "eos": tuple(map(int, eos_token_ids)),
        "report": report,
    }
    least = SMALLEST_QUANTIZED_CACHE if isinstance(model, Quantized) else SMALLEST_CACHE
    done = np.arange(rows) >= B
    left = max_new_tokens
    state, slots, used = None, 0, 0
    pending: collections.deque[Chosen] = collections.deque()

    def read() -> Chosen:
        """The oldest call's tokens, put down in `texts` and `windows`."""
        nonlocal done
        chosen = jax.tree.map(lambda x: np.asarray(x)[:B], pending.popleft())
        for text, window, ids in zip(texts, windows, chosen.ids, strict=True):
            new = [int(i) for i in ids if i != NO_TOKEN]
            text += new
            window += new
        done[:B] = chosen.done
        return chosen

    while left > 0:
        if state is None or used == context:
            while pending:  # what is prefilled must be known
                yield read()
            if done.all():
                return
            windows = [w[-1:] if over else _window(w, context) for w, over in zip(windows, done[:B], strict=True)]
            tokens, start, used = _left_padded(windows, rows, config)
            seen = np.zeros((rows, config.vocab_size), bool)
            for row, text in zip(seen, texts, strict=False):
                row[text] = True
            slots = min(max(tokens.shape[1], least), context)
            stacked = model if isinstance(model, SmolLM) else model.model
            cache, logits = prefill(stacked, tokens, start, used, slots=slots)
            cache = taken_apart(cache) if isinstance(model, Quantized) else cache
            count = jnp.full(rows, max_new_tokens - left, jnp.int32)
            state = Decoding(cache, start, jnp.zeros_like(start), jnp.array(done), count, jnp.array(seen))
            state, chosen = begin(state, logits, knobs, **options)
            steps = 1
        else:
            if used == slots:
                slots = next(size for size in buckets(config) if size > slots)
                state = grow(state, slots=slots)
            steps = min(tokens_per_call, left, slots - used)
            tokens_of = decode_quantized if isinstance(model, Quantized) else decode
            state, chosen = tokens_of(model, state, knobs, steps, most=tokens_per_call, **options)
            chosen = jax.tree.map(lambda x, n=steps: x if x.ndim == 1 else x[:, :n], chosen)
            used += steps
        left -= steps
        pending.append(chosen)
        if len(pending) > 1:
            yield read()
            if done.all():
                return
    while pending and not done.all():
        yield read()


def _window(tokens: list[int], context: int) -> list[int]:
    """The tokens that a row goes on from: all, or the last half of a full context."""
    return list(tokens) if len(tokens) <= context else tokens[-(context // 2) :]


def _left_padded(windows: list[list[int]], rows: int, config: Config) -> tuple[Array, Array, int]:
    """Tokens `[rows, bucket]`, each row's first slot, and the slots in use: nothing looks beyond them."""
    used = max(map(len, windows))
    bucket = next(size for size in buckets(config) if size >= used)
    tokens, start = np.zeros((rows, bucket), np.int32), np.full(rows, used - 1, np.int32)
    for row, window in enumerate(windows):
        start[row] = used - len(window)
        tokens[row, start[row] : used] = window
    return jnp.array(tokens), jnp.array(start), used


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
    hidden, cache = model.hidden_states(tokens, positions=positions, attend=cached(start, empty=True), memory=cache)
    last = jax.lax.dynamic_slice_in_dim(hidden, used - 1, 1, axis=1)
    # Slots from `used` on hold nothing of use: they are written again before anything sees them.
    return dataclasses.replace(cache.advance(0), length=used), model.logits(last)[:, 0]


@jax.jit
def taken_apart(cache: KVCache) -> LayerCaches:
    """The cache as a `Quantized` model decodes with it."""
    return LayerCaches.of(cache)


@functools.partial(jax.jit, static_argnames="slots")
def grow(state: Decoding, *, slots: int) -> Decoding:
    """The same state with a cache of `slots`."""
    return dataclasses.replace(state, cache=state.cache.grown(slots))


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
    attend = cached_by_layer if isinstance(model, Quantized) else cached

    def more(carry):
        i, state, _ = carry
        return (i < steps) & ~state.done.all()

    def step(carry):
        i, state, out = carry
        positions = (state.cache.length - state.start)[:, None]
        # advance(0): where the layers are laid out, each finds its place in the cache when the program is compiled.
        hidden, cache = model.hidden_states(
            state.token[:, None], positions=positions, attend=attend(state.start), memory=state.cache.advance(0)
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
