"""Batched generation: one prefill of the prompts, then a decode loop on the device.

Prompts of different lengths are padded on the left; padding is masked by position, never by a token id, because the
base model has no pad token. Programs are compiled per bucket: prompts are padded on the right, which is never attended,
to 64, 128, ... tokens; the cache has the size of a bucket and doubles when it is full; and the batch is padded to a
power of two rows. So a context of 8,192 needs at most 8 prefill programs per batch size.
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
from smollm_jax.generation.programs import PAD_ID, DecodeOutput, DecodeState
from smollm_jax.generation.quantized import Quantized
from smollm_jax.generation.sampling import GREEDY, BatchedSampling, Sampling
from smollm_jax.generation.unrolled import Unrolled
from smollm_jax.model.smollm import SmolLM

# On a CPU a device call costs 0.1 ms and a token 15 ms; a GPU is faster with a few tokens per call.
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
    """Yields new tokens `[B, n]` as they are generated, including eos; `PAD_ID` after a row's end.

    Raises `UsageError` for an empty prompt, a token id outside the vocabulary, and a prompt that together with
    `max_new_tokens` exceeds the context.
    """
    validate_prompts(model.config, prompts, max_new_tokens)
    for output in stream_tokens(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        samplings=[sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling,
        eos_token_ids=eos_token_ids,
        tokens_per_call=tokens_per_call,
    ):
        yield np.asarray(output.ids)


def validate_prompts(config: Config, prompts: Any, max_new_tokens: Any, *, slide: bool = False) -> None:
    """Raises `UsageError` for arguments that `stream_tokens` does not support."""

    def is_integer(value: Any) -> bool:
        return isinstance(value, int | np.integer) and not isinstance(value, bool)

    are_ids = False
    with contextlib.suppress(TypeError):  # a single prompt, or None
        are_ids = all(is_integer(token) for prompt in prompts for token in prompt)
    if isinstance(prompts, str) or not are_ids:
        raise UsageError(f"prompts must be sequences of token ids, one for each text, got {short_repr(prompts)}")
    if not len(prompts) or min(len(prompt) for prompt in prompts) == 0:
        raise UsageError("a prompt must have at least one token")
    if not is_integer(max_new_tokens) or max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be an integer of at least 1, got {short_repr(max_new_tokens)}")
    if invalid := [int(t) for prompt in prompts for t in prompt if not 0 <= t < config.vocab_size]:
        raise UsageError(f"token ids {invalid[:5]} are outside the vocabulary of {config.vocab_size}")
    longest = max(len(prompt) for prompt in prompts)
    if not slide and longest + max_new_tokens > config.max_position_embeddings:
        raise UsageError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of "
            f"{config.max_position_embeddings}"
        )


def stream_tokens(
    model: SmolLM | Unrolled | Quantized,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    samplings: Sequence[Sampling],
    eos_token_ids: Sequence[int] = (),
    tokens_per_call: int = TOKENS_PER_CALL,
    return_logprobs: bool = False,
    slide: bool = False,
) -> Generator[DecodeOutput, None, None]:
    """Yields the output of each device call as NumPy arrays until every row has ended; see `validate_prompts`.

    The next call starts before the tokens of the last one are read, so at most one call still runs when the iterator
    is closed. With `slide`, rows whose context is full continue from the last half of their tokens as a new prompt.
    """
    session = Session(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        samplings=samplings,
        eos_token_ids=eos_token_ids,
        tokens_per_call=tokens_per_call,
        return_logprobs=return_logprobs,
    )
    while session.remaining > 0:
        if session.needs_prefill:
            while session.pending:  # a prefill needs all earlier tokens on the host
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
    """The tokens of all rows on the host, their decode state on the device, and the pending device calls.

    `prefill` and `decode` start a device call each; `collect` waits for the oldest one and reads its output.
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
        return_logprobs: bool,
    ) -> None:
        self.model = model
        self.config = model.config
        self.context = model.config.max_position_embeddings
        self.max_new_tokens = self.remaining = max_new_tokens
        self.tokens_per_call = tokens_per_call
        self.texts = [list(map(int, prompt)) for prompt in prompts]  # all tokens of each row
        self.windows = [_window(text, self.context) for text in self.texts]  # the tokens in each row's context
        self.rows = 1 << (len(prompts) - 1).bit_length()  # on the device; padding rows are done from the start
        self.done = np.arange(self.rows) >= len(prompts)
        self.sampling = BatchedSampling.stack([*samplings, *[GREEDY] * (self.rows - len(prompts))])
        self.options: dict[str, Any] = {
            "greedy": all(sampling.is_greedy for sampling in samplings),
            "eos": tuple(map(int, eos_token_ids)),
            "return_logprobs": return_logprobs,
        }
        self.state: DecodeState | None = None
        self.cache_size = self.cache_length = 0  # slots in the cache, and how many of them are filled
        self.pending: collections.deque[DecodeOutput] = collections.deque()

    @property
    def needs_prefill(self) -> bool:
        """Whether the cache is still empty, or the context is full."""
        return self.state is None or self.cache_length == self.context

    def prefill(self) -> None:
        """Fills a new cache with the rows' windows and samples the next token; no call may be pending."""
        quantized = isinstance(self.model, Quantized)
        # A row that has ended keeps one token, because all rows share the length of the longest window.
        self.windows = [
            window[-1:] if done else _window(window, self.context)
            for window, done in zip(self.windows, self.done[: len(self.texts)], strict=True)
        ]
        tokens, start, self.cache_length = _pad_left(self.windows, self.rows, self.config)
        seen = np.zeros((self.rows, self.config.vocab_size), bool)
        for row, text in zip(seen, self.texts, strict=False):
            row[text] = True
        minimum = programs.SMALLEST_QUANTIZED_CACHE if quantized else programs.SMALLEST_CACHE
        self.cache_size = min(max(tokens.shape[1], minimum), self.context)
        stacked = self.model if isinstance(self.model, SmolLM) else self.model.model
        cache, logits = programs.prefill(stacked, tokens, start, self.cache_length, cache_size=self.cache_size)
        cache = programs.unstack_cache(cache) if quantized else cache
        count = jnp.full(self.rows, self.max_new_tokens - self.remaining, jnp.int32)
        state = DecodeState(cache, start, jnp.zeros_like(start), jnp.array(self.done), count, jnp.array(seen))
        self.state, output = programs.sample_first(state, logits, self.sampling, **self.options)
        self.remaining -= 1
        self.pending.append(output)

    def decode(self) -> None:
        """Samples up to `tokens_per_call` tokens per row; a full cache first grows to the next bucket."""
        if self.cache_length == self.cache_size:
            self.cache_size = next(size for size in programs.buckets(self.config) if size > self.cache_size)
            self.state = programs.grow_cache(self.state, cache_size=self.cache_size)
        steps = min(self.tokens_per_call, self.remaining, self.cache_size - self.cache_length)
        decode = programs.decode_quantized if isinstance(self.model, Quantized) else programs.decode
        self.state, output = decode(
            self.model, self.state, self.sampling, steps, max_steps=self.tokens_per_call, **self.options
        )
        self.cache_length += steps
        self.remaining -= steps
        self.pending.append(jax.tree.map(lambda x: x if x.ndim == 1 else x[:, :steps], output))

    def collect(self) -> DecodeOutput:
        """The output of the oldest pending call as NumPy arrays; its tokens are added to `texts` and `windows`."""
        rows = len(self.texts)
        output = jax.tree.map(lambda x: np.asarray(x)[:rows], self.pending.popleft())
        for text, window, ids in zip(self.texts, self.windows, output.ids, strict=True):
            new = [int(i) for i in ids if i != PAD_ID]
            text += new
            window += new
        self.done[:rows] = output.done
        return output


def _window(tokens: list[int], context: int) -> list[int]:
    """The tokens that a row continues from: all of them, or the last half of a full context."""
    return list(tokens) if len(tokens) <= context else tokens[-(context // 2) :]


def _pad_left(windows: list[list[int]], rows: int, config: Config) -> tuple[Array, Array, int]:
    """Tokens `[rows, bucket]`, the first slot of each row that is not padding, and the length of the longest window."""
    length = max(map(len, windows))
    bucket = next(size for size in programs.buckets(config) if size >= length)
    tokens, start = np.zeros((rows, bucket), np.int32), np.full(rows, length - 1, np.int32)
    for row, window in enumerate(windows):
        start[row] = length - len(window)
        tokens[row, start[row] : length] = window
    return jnp.array(tokens), jnp.array(start), length
