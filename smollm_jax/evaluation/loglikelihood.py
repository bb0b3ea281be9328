"""How likely a model finds given tokens: log-probabilities of continuations.

Logits exist for the scored tokens of one chunk at a time. Continuations of one context share its forward pass: they
lie after it in one row, each seeing the context and itself, at the positions it would have alone.

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

SMALLEST_ROW = 64  # tokens; rows are filled up to it, twice it, ..., so that few programs are compiled
LONGEST_TREE = 1024  # tokens of a row that several continuations share: its mask is dense
CPU_BATCH_TOKENS, BATCH_TOKENS = 1024, 16384  # of one program, filling included
CONTEXT = 0  # the segment of a row's shared context; its continuations are 1, 2, ..., filling is -1


class Request(NamedTuple):
    """Tokens to score after tokens that are given; both hold at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Score(NamedTuple):
    """The sum of the log-probabilities of a continuation's tokens, and whether each is the likeliest one."""

    logprob: float
    is_greedy: bool


def shared_context(segments: Int[Array, "B T"]) -> Attend:
    """Causal within `segments`, of which each sees the context, segment 0, too."""
    order = jnp.arange(segments.shape[1])
    own = segments[:, :, None] == segments[:, None, :]
    mask = (order <= order[:, None]) & (own | (segments == CONTEXT)[:, None, :])

    def attend(q, k, v, cache):
        return attention(q, k, v, mask[:, None]), cache

    return attend


@functools.partial(jax.jit, static_argnames=("chunk", "tree"))
def _score(
    model: SmolLM,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    places: Int[Array, "M"],
    targets: Int[Array, "M"],
    *,
    chunk: int,
    tree: bool,
) -> tuple[Float[Array, "M"], Bool[Array, "M"]]:
    """For each place of the flattened rows: its target's log-probability there, and whether it is the likeliest."""
    attend = shared_context(segments) if tree else causal()
    hidden, _ = model.hidden_states(tokens, positions=positions, attend=attend)
    hidden = hidden.reshape(-1, hidden.shape[-1])[places]

    def one(about):
        h, target = about
        logits = model.logits(h[None, None])[0, 0]
        return logits[target] - jax.nn.logsumexp(logits), jnp.argmax(logits) == target

    return jax.lax.map(one, (hidden, targets), batch_size=chunk)


@dataclasses.dataclass
class _Row:
    """One row under way: a context and the continuations that share it, by the number of their request."""

    context: tuple[int, ...]
    members: list[tuple[int, tuple[int, ...]]]

    @property
    def length(self) -> int:
        return len(self.context) + sum(len(continuation) - 1 for _, continuation in self.members)


def score(
    model: SmolLM, requests: Sequence[Request], *, progress: Callable[[int], object] = lambda tokens: None
) -> list[Score]:
    """The score of every request, in their order; `progress` is told the tokens scored by each program's end.

    Raises `UsageError` for an empty context or continuation, a request longer than the model's context (whose last
    token is only ever a target) and a token outside the vocabulary.
    """
    config = model.config
    for request in requests:
        if not request.context or not request.continuation:
            raise UsageError("a request needs a context and a continuation of at least one token each")
        if (length := len(request.context) + len(request.continuation) - 1) > config.max_position_embeddings:
            raise UsageError(f"a request of {length} tokens exceeds the context of {config.max_position_embeddings}")
        if not all(0 <= token < config.vocab_size for part in request for token in part):
            raise UsageError(f"a token id is outside the vocabulary of {config.vocab_size}")
    on_cpu = jax.default_backend() == "cpu"
    chunk = CPU_CHUNK_TOKENS if on_cpu else CHUNK_TOKENS
    logprobs, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    for rows in _batches(_rows(requests), CPU_BATCH_TOKENS if on_cpu else BATCH_TOKENS, config.max_position_embeddings):
        arrays, owners = _laid_out(rows, config.max_position_embeddings)
        tree = any(len(row.members) > 1 for row in rows)
        with without_tf32(model.embed_tokens.dtype):
            got = _score(model, *arrays, chunk=min(chunk, arrays[-1].size), tree=tree)
        # Summed in float64: a text of 10,000 tokens has 13 more bits than each of them.
        numbers, best = np.asarray(got[0], np.float64)[: owners.size], np.asarray(got[1])[: owners.size]
        np.add.at(logprobs, owners, numbers)
        np.logical_and.at(greedy, owners, best)
        progress(owners.size)
    return [Score(float(number), bool(best)) for number, best in zip(logprobs, greedy, strict=True)]


def _rows(requests: Sequence[Request]) -> list[_Row]:
    """The requests in rows, those of one context together while a row is no longer than `LONGEST_TREE`."""
    rows: list[_Row] = []
    begun: dict[tuple[int, ...], _Row] = {}
    for number, (context, continuation) in enumerate(requests):
        row = begun.get(context)
        if row is None or row.length + len(continuation) - 1 > LONGEST_TREE:
            row = begun[context] = _Row(context, [])
            rows.append(row)
        row.members.append((number, continuation))
    return rows


def _size(tokens: int, most: int) -> int:
    """The smallest of 64, 128, ... and `most` that holds so many tokens."""
    return min(max(SMALLEST_ROW, 1 << (tokens - 1).bit_length()), most)


def _batches(rows: list[_Row], tokens: int, context: int) -> Iterator[list[_Row]]:
    """Rows of one size together, the longest first; rows that share a context apart from those that do not."""
    groups: dict[tuple[int, bool], list[_Row]] = {}
    for row in rows:
        groups.setdefault((_size(row.length, max(context, LONGEST_TREE)), len(row.members) > 1), []).append(row)
    for (size, _), group in sorted(groups.items(), reverse=True):
        count = max(1, tokens // size)
        yield from (group[i : i + count] for i in range(0, len(group), count))


def _laid_out(rows: list[_Row], context: int) -> tuple[tuple[Array, ...], np.ndarray]:
    """A batch's arrays as `_score` takes them, and whose request each scored token belongs to.

    The last token of a continuation is a target only. The scored tokens of a continuation are its own, so that its
    first is read off the context's last token.
    """
    size = _size(max(row.length for row in rows), max(context, LONGEST_TREE))
    count = 1 << (len(rows) - 1).bit_length()
    tokens, positions = np.zeros((count, size), np.int32), np.zeros((count, size), np.int32)
    segments = np.full((count, size), -1, np.int32)
    places, targets, owners = [], [], []
    for index, row in enumerate(rows):
        last = len(row.context) - 1
        tokens[index, : last + 1], segments[index, : last + 1] = row.context, CONTEXT
        positions[index, : last + 1] = range(last + 1)
        end = last + 1
        for segment, (number, continuation) in enumerate(row.members, 1):
            inputs = len(continuation) - 1
            inside = slice(end, end + inputs)
            tokens[index, inside], segments[index, inside] = continuation[:-1], segment
            positions[index, inside] = range(last + 1, last + 1 + inputs)
            places += [index * size + place for place in (last, *range(end, end + inputs))]
            targets += continuation
            owners += [number] * len(continuation)
            end += inputs
    room = (1 << max(6, (len(places) - 1).bit_length())) - len(places)
    lists = (np.pad(np.array(values, np.int32), (0, room)) for values in (places, targets))
    return tuple(map(jnp.asarray, (tokens, positions, segments, *lists))), np.array(owners)
