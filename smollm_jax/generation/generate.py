"""Text continued by a model: one prefill of the prompts, then a decode loop that stays on the device.

Prompts of different lengths are padded on the left; padding is masked by position, never by a token id, because the
base model has no pad token. Programs are compiled per bucket: prompts are filled up (on the right, where nothing
looks) to 64, 128, ... slots, the cache has as many as a bucket and doubles when it is full, and the rows of a batch
are filled up to a power of two. So a context of 8,192 needs at most 8 prefill programs a batch size.

B rows, T prompt slots, V vocab.
"""

import collections
import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from smollm_jax.config import Config
from smollm_jax.errors import UsageError, shown
from smollm_jax.generation.programs import (
    NO_TOKEN,
    SMALLEST_CACHE,
    SMALLEST_QUANTIZED_CACHE,
    Chosen,
    Decoding,
    begin,
    buckets,
    decode,
    decode_quantized,
    grow,
    prefill,
    taken_apart,
)
from smollm_jax.generation.quantized import Quantized
from smollm_jax.generation.sampling import GREEDY, Knobs, Sampling
from smollm_jax.generation.unrolled import Unrolled
from smollm_jax.model.smollm import SmolLM

# A call's fixed cost is far below a token's on a CPU (0.1 against 15 ms); a GPU gains from a few tokens a call.
TOKENS_PER_CALL = 8


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
