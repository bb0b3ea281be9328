"""The quality of a model on a text: loss, perplexity and bits per byte by sliding windows."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from smollm_jax.errors import UsageError
from smollm_jax.evaluation.loglikelihood import Request, score
from smollm_jax.model.smollm import SmolLM
from smollm_jax.runs.metrics import bits_per_byte


@dataclasses.dataclass(frozen=True)
class Quality:
    """How well a model predicts a text: `nats` is the sum of -log probability over its tokens."""

    nats: float
    tokens: int
    bytes: int
    documents: int

    @property
    def loss(self) -> float:
        """Nats a token; depends on the tokenizer."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of UTF-8: the same scale for every tokenizer (Gao et al. 2020, The Pile, section 3.1)."""
        return bits_per_byte(self.loss, self.bytes / self.tokens)


def windows(tokens: Sequence[int], length: int, stride: int) -> Iterator[Request]:
    """A document, its first token given and each later one scored once, in windows of at most `length` inputs.

    Each window after the first begins `stride` tokens later and scores what no earlier one did, so a token there has
    at least `length - stride` tokens before it.
    """
    scored = 1
    for begin in range(0, len(tokens), stride):
        end = min(begin + length + 1, len(tokens))
        if end > scored:
            yield Request(tuple(tokens[begin:scored]), tuple(tokens[scored:end]))
        scored = max(scored, end)
        if end == len(tokens):
            return


def quality(
    model: SmolLM,
    documents: Iterable[tuple[Sequence[int], int]],
    *,
    length: int,
    stride: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Quality:
    """The quality on documents of (token ids, bytes of text); a document's first id is given, and counts nothing.

    Raises `UsageError` for a stride outside 1 to `length` (text would be left out), for a length beyond the model's
    context, and where nothing is left to score.
    """
    if not 1 <= length <= model.config.max_position_embeddings:
        raise UsageError(
            f"length must be from 1 to the context of {model.config.max_position_embeddings}, got {length}"
        )
    if not 1 <= stride <= length:
        raise UsageError(f"stride must be from 1 to the length of {length}, got {stride}")
    requests: list[Request] = []
    size = count = 0
    for ids, of_text in documents:
        requests += windows(ids, length, stride)
        size, count = size + of_text, count + 1
    tokens = sum(len(request.continuation) for request in requests)
    if not tokens or not size:
        raise UsageError("the text has no token to score")
    nats = -math.fsum(one.logprob for one in score(model, requests, progress=progress))
    return Quality(nats, tokens, size, count)
