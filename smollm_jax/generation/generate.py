"""Text continued by a model: one prefill of the prompts, then a decode loop that stays on the device.

Prompts of different lengths are padded on the left; padding is masked by position, never by a token id, because the
base model has no pad token. Programs are compiled per bucket: prompts are filled up (on the right, where nothing
looks) to 64, 128, ... slots, the cache has as many as a bucket and doubles when it is full, and the rows of a batch
are filled up to a power of two. So a context of 8,192 needs at most 8 prefill programs a batch size.
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
from smollm_jax.errors import UsageError, short_repr
from smollm_jax.generation import programs
from smollm_jax.generation.programs import NO_TOKEN, Chosen, Decoding
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
        raise UsageError(f"prompts must be sequences of token ids, one for each text, got {short_repr(prompts)}")
    if not len(prompts) or min(len(prompt) for prompt in prompts) == 0:
        raise UsageError("a prompt must have at least one token")
    if not whole(max_new_tokens) or max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be an integer of at least 1, got {short_repr(max_new_tokens)}")
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
    session = Session(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        samplings=samplings,
        eos_token_ids=eos_token_ids,
        tokens_per_call=tokens_per_call,
        report=report,
    )
    while session.remaining > 0:
        if session.needs_prefill:
            while session.pending:  # a prefill needs every token that was chosen before it
                yield session.collect()
            if session.done.all():
                return
            session.prefill()
        else:
            session.decode()
        if len(session.pending) > 1:
            yield session.collect()
            if session.done.all():
                return
    while session.pending and not session.done.all():
        yield session.collect()


class Session:
    """The rows' tokens on the host, their state on the device, and the device calls whose tokens nobody has read yet.

    `prefill` and `decode` start a device call each; `collect` waits for the oldest one and reads it.
    """

    def __init__(
        self,
        model: SmolLM | Unrolled | Quantized,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        samplings: Sequence[Sampling],
        eos_token_ids: Sequence[int],
        tokens_per_call: int,
        report: bool,
    ) -> None:
        self.model = model
        self.config = model.config
        self.context = model.config.max_position_embeddings
        self.max_new_tokens = self.remaining = max_new_tokens
        self.tokens_per_call = tokens_per_call
        self.texts = [list(map(int, prompt)) for prompt in prompts]  # all tokens of a row
        self.windows = [_window(text, self.context) for text in self.texts]  # those that the row still sees
        self.rows = 1 << (len(prompts) - 1).bit_length()  # on the device; those that fill up are done
        self.done = np.arange(self.rows) >= len(prompts)
        self.knobs = Knobs.of([*samplings, *[GREEDY] * (self.rows - len(prompts))])
        self.options: dict[str, Any] = {
            "greedy": all(sampling.is_greedy for sampling in samplings),
            "eos": tuple(map(int, eos_token_ids)),
            "report": report,
        }
        self.state: Decoding | None = None
        self.slots = self.used = 0  # of the cache
        self.pending: collections.deque[Chosen] = collections.deque()

    @property
    def needs_prefill(self) -> bool:
        """Whether nothing is in the cache yet, or nothing more fits into the context."""
        return self.state is None or self.used == self.context

    def prefill(self) -> None:
        """Fills a new cache with the rows' windows and chooses the next token; no call may be pending."""
        quantized = isinstance(self.model, Quantized)
        # A row that has ended keeps one token: a longer one would take context from the others.
        self.windows = [
            window[-1:] if done else _window(window, self.context)
            for window, done in zip(self.windows, self.done[: len(self.texts)], strict=True)
        ]
        tokens, start, self.used = _left_padded(self.windows, self.rows, self.config)
        seen = np.zeros((self.rows, self.config.vocab_size), bool)
        for row, text in zip(seen, self.texts, strict=False):
            row[text] = True
        least = programs.SMALLEST_QUANTIZED_CACHE if quantized else programs.SMALLEST_CACHE
        self.slots = min(max(tokens.shape[1], least), self.context)
        stacked = self.model if isinstance(self.model, SmolLM) else self.model.model
        cache, logits = programs.prefill(stacked, tokens, start, self.used, slots=self.slots)
        cache = programs.unstack_cache(cache) if quantized else cache
        count = jnp.full(self.rows, self.max_new_tokens - self.remaining, jnp.int32)
        state = Decoding(cache, start, jnp.zeros_like(start), jnp.array(self.done), count, jnp.array(seen))
        self.state, chosen = programs.begin(state, logits, self.knobs, **self.options)
        self.remaining -= 1
        self.pending.append(chosen)

    def decode(self) -> None:
        """Chooses up to `tokens_per_call` tokens a row; a full cache grows to the next bucket before."""
        if self.used == self.slots:
            self.slots = next(size for size in programs.buckets(self.config) if size > self.slots)
            self.state = programs.grow(self.state, slots=self.slots)
        steps = min(self.tokens_per_call, self.remaining, self.slots - self.used)
        decode = programs.decode_quantized if isinstance(self.model, Quantized) else programs.decode
        self.state, chosen = decode(
            self.model, self.state, self.knobs, steps, most=self.tokens_per_call, **self.options
        )
        self.used += steps
        self.remaining -= steps
        self.pending.append(jax.tree.map(lambda x: x if x.ndim == 1 else x[:, :steps], chosen))

    def collect(self) -> Chosen:
        """The oldest pending call's choice as NumPy arrays, its tokens added to `texts` and `windows`."""
        rows = len(self.texts)
        chosen = jax.tree.map(lambda x: np.asarray(x)[:rows], self.pending.popleft())
        for text, window, ids in zip(self.texts, self.windows, chosen.ids, strict=True):
            new = [int(i) for i in ids if i != NO_TOKEN]
            text += new
            window += new
        self.done[:rows] = chosen.done
        return chosen


def _window(tokens: list[int], context: int) -> list[int]:
    """The tokens that a row goes on from: all, or the last half of a full context."""
    return list(tokens) if len(tokens) <= context else tokens[-(context // 2) :]


def _left_padded(windows: list[list[int]], rows: int, config: Config) -> tuple[Array, Array, int]:
    """Tokens `[rows, bucket]`, each row's first slot, and the slots in use: nothing looks beyond them."""
    used = max(map(len, windows))
    bucket = next(size for size in programs.buckets(config) if size >= used)
    tokens, start = np.zeros((rows, bucket), np.int32), np.full(rows, used - 1, np.int32)
    for row, window in enumerate(windows):
        start[row] = used - len(window)
        tokens[row, start[row] : used] = window
    return jnp.array(tokens), jnp.array(start), used
