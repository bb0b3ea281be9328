"""Log-probabilities of given continuations after given contexts.

Logits are computed for one chunk of scored tokens at a time. Continuations of the same context share its forward pass:
they are packed after it in one row, each attends to the context and to itself, at the positions it would have alone.

B rows, T tokens, M scored tokens, D hidden, V vocab.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from smollm_jax.errors import UsageError
from smollm_jax.model.attention import Attend, attention, causal
from smollm_jax.model.cross_entropy import CHUNK_TOKENS, CPU_CHUNK_TOKENS
from smollm_jax.model.precision import without_tf32
from smollm_jax.model.smollm import SmolLM

SMALLEST_ROW = 64  # tokens; rows are padded to it, twice it, ..., so that few programs are compiled
LONGEST_SHARED_ROW = 1024  # tokens of a row with several continuations: its mask is dense
CPU_BATCH_TOKENS, BATCH_TOKENS = 1024, 16384  # of one program, padding included
CONTEXT = 0  # segment id of a row's shared context; its continuations are 1, 2, ..., padding is -1


class Request(NamedTuple):
    """Tokens to score (`continuation`) after given tokens (`context`); at least one of each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Score(NamedTuple):
    """A continuation's summed log-probability, and whether each of its tokens is the most likely one."""

    logprob: float
    is_greedy: bool


def shared_prefix(segment_ids: Int[Array, "B T"]) -> Attend:
    """Causal attention in which a token sees its own segment and the context, segment 0."""
    index = jnp.arange(segment_ids.shape[1])
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask = (index <= index[:, None]) & (same_segment | (segment_ids == CONTEXT)[:, None, :])

    def attend(q, k, v, cache):
        return attention(q, k, v, mask[:, None]), cache

    return attend


@functools.partial(jax.jit, static_argnames=("chunk", "shares_prefix"))
def _score(
    model: SmolLM,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    indices: Int[Array, "M"],
    targets: Int[Array, "M"],
    *,
    chunk: int,
    shares_prefix: bool,
) -> tuple[Float[Array, "M"], Bool[Array, "M"]]:
    """For each index into the flattened rows: the target's log-probability there, and whether it is the most likely."""
    attend = shared_prefix(segment_ids) if shares_prefix else causal()
    hidden, _ = model.hidden_states(tokens, positions=positions, attend=attend)
    hidden = hidden.reshape(-1, hidden.shape[-1])[indices]

    def score_token(hidden_and_target):
        h, target = hidden_and_target
        logits = model.logits(h[None, None])[0, 0]
        return logits[target] - jax.nn.logsumexp(logits), jnp.argmax(logits) == target

    return jax.lax.map(score_token, (hidden, targets), batch_size=chunk)


@dataclasses.dataclass
class _PackedRow:
    """A row of a batch: a context and the continuations that share it, each with the index of its request."""

    context: tuple[int, ...]
    continuations: list[tuple[int, tuple[int, ...]]]

    @property
    def length(self) -> int:
        return len(self.context) + sum(len(continuation) - 1 for _, continuation in self.continuations)


def score(
    model: SmolLM, requests: Sequence[Request], *, progress: Callable[[int], object] = lambda tokens: None
) -> list[Score]:
    """The score of every request, in order; calls `progress` with the number of tokens that each batch scored.

    Raises `UsageError` for an empty context or continuation, a token outside the vocabulary, and a request longer than
    the model's context (not counting its last token, which is only a target).
    """
    config = model.config
    for request in requests:
        if not request.context or not request.continuation:
            raise UsageError("a request needs a context and a continuation of at least one token each")
        if (length := len(request.context) + len(request.continuation) - 1) > config.max_position_embeddings:
            raise UsageError(f"a request of {length} tokens exceeds the context of {config.max_position_embeddings}")
        if not all(0 <= token < config.vocab_size for tokens in request for token in tokens):
            raise UsageError(f"a token id is outside the vocabulary of {config.vocab_size}")
    on_cpu = jax.default_backend() == "cpu"
    chunk = CPU_CHUNK_TOKENS if on_cpu else CHUNK_TOKENS
    logprobs, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    for rows in _batches(_pack(requests), CPU_BATCH_TOKENS if on_cpu else BATCH_TOKENS, config.max_position_embeddings):
        arrays, request_ids = _to_arrays(rows, config.max_position_embeddings)
        shares_prefix = any(len(row.continuations) > 1 for row in rows)
        with without_tf32(model.embed_tokens.dtype):
            scored = _score(model, *arrays, chunk=min(chunk, arrays[-1].size), shares_prefix=shares_prefix)
        # Sum in float64: the sum over 10,000 tokens needs 13 bits more than one of them.
        token_logprobs, is_likeliest = np.asarray(scored[0], np.float64), np.asarray(scored[1])
        np.add.at(logprobs, request_ids, token_logprobs[: request_ids.size])
        np.logical_and.at(greedy, request_ids, is_likeliest[: request_ids.size])
        progress(request_ids.size)
    return [Score(float(logprob), bool(is_greedy)) for logprob, is_greedy in zip(logprobs, greedy, strict=True)]


def _pack(requests: Sequence[Request]) -> list[_PackedRow]:
    """Packs requests of the same context into shared rows of at most `LONGEST_SHARED_ROW` tokens."""
    rows: list[_PackedRow] = []
    open_rows: dict[tuple[int, ...], _PackedRow] = {}  # by context
    for request_id, (context, continuation) in enumerate(requests):
        row = open_rows.get(context)
        if row is None or row.length + len(continuation) - 1 > LONGEST_SHARED_ROW:
            row = open_rows[context] = _PackedRow(context, [])
            rows.append(row)
        row.continuations.append((request_id, continuation))
    return rows


def _padded_length(tokens: int, longest: int) -> int:
    """The smallest of 64, 128, ... and `longest` that holds so many tokens."""
    return min(max(SMALLEST_ROW, 1 << (tokens - 1).bit_length()), longest)


def _batches(rows: list[_PackedRow], tokens: int, context: int) -> Iterator[list[_PackedRow]]:
    """Batches of rows of one padded length, the longest first; shared rows are not mixed with others."""
    groups: dict[tuple[int, bool], list[_PackedRow]] = {}
    for row in rows:
        groups.setdefault(
            (_padded_length(row.length, max(context, LONGEST_SHARED_ROW)), len(row.continuations) > 1), []
        ).append(row)
    for (length, _), group in sorted(groups.items(), reverse=True):
        count = max(1, tokens // length)
        yield from (group[i : i + count] for i in range(0, len(group), count))


def _to_arrays(rows: list[_PackedRow], context: int) -> tuple[tuple[Array, ...], np.ndarray]:
    """A batch as the arrays that `_score` takes, and the request index of each scored token.

    The context's last token predicts a continuation's first token; the last one is only a target, not an input.
    """
    length = _padded_length(max(row.length for row in rows), max(context, LONGEST_SHARED_ROW))
    count = 1 << (len(rows) - 1).bit_length()
    tokens, positions = np.zeros((count, length), np.int32), np.zeros((count, length), np.int32)
    segment_ids = np.full((count, length), -1, np.int32)
    indices, targets, request_ids = [], [], []
    for index, row in enumerate(rows):
        last = len(row.context) - 1
        tokens[index, : last + 1], segment_ids[index, : last + 1] = row.context, CONTEXT
        positions[index, : last + 1] = range(last + 1)
        end = last + 1
        for segment, (request_id, continuation) in enumerate(row.continuations, 1):
            inputs = len(continuation) - 1
            span = slice(end, end + inputs)
            tokens[index, span], segment_ids[index, span] = continuation[:-1], segment
            positions[index, span] = range(last + 1, last + 1 + inputs)
            indices += [index * length + i for i in (last, *range(end, end + inputs))]
            targets += continuation
            request_ids += [request_id] * len(continuation)
            end += inputs
    padding = (1 << max(6, (len(indices) - 1).bit_length())) - len(indices)
    padded = (np.pad(np.array(values, np.int32), (0, padding)) for values in (indices, targets))
    return tuple(map(jnp.asarray, (tokens, positions, segment_ids, *padded))), np.array(request_ids)
