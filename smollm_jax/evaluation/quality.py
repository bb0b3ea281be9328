"""The quality of a model on a text: loss, perplexity and bits per byte by sliding windows."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress

from smollm_jax import weights
from smollm_jax.config import Config
from smollm_jax.data.bad_text import BadTextHandler
from smollm_jax.data.text import documents
from smollm_jax.data.text_counts import SpecialTokens, counts_of, sentences
from smollm_jax.data.text_sources import select_files
from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.evaluation.loglikelihood import Request, score
from smollm_jax.model.smollm import SmolLM
from smollm_jax.runs.metrics import bits_per_byte
from smollm_jax.tokenizer import Tokenizer


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


@dataclasses.dataclass(frozen=True)
class Texts:
    """The documents to measure on, and how they are read: see the flags of `evaluate`."""

    data: Path
    text_column: str = "text"
    on_bad_text: Literal["stop", "skip", "replace"] = "stop"
    special_tokens: bool = False


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


def measure(
    path: Path,
    texts: Texts,
    *,
    length: int | None,
    stride: int | None,
    dtype: str,
    tokenizer_path: Path | None,
    printed: dict[str, None],
) -> dict[str, Any]:
    """What one set of weights makes of the texts, as a row of a table.

    `length` and `stride` are tokens (None: the context, at most 2,048, and half of the length). Prints on stderr what
    of the text is left out, unless it was `printed` for weights before.
    """
    tokenizer = Tokenizer.of_weights(path, tokenizer_path)
    model, config = weights.load(path, jnp.dtype(dtype))
    length = length or min(2048, config.max_position_embeddings)
    stride = stride or max(1, length // 2)
    documents, lines = encoded(texts, tokenizer, config)
    for line in lines:
        if line not in printed:
            print(line, file=sys.stderr)
    printed.update(dict.fromkeys(lines))
    total = sum(len(ids) - 1 for ids, _ in documents)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(str(path), total=total)
        began = time.perf_counter()
        result = quality(
            model, documents, length=length, stride=stride, progress=lambda tokens: bar.advance(task, tokens)
        )
        seconds = time.perf_counter() - began
    step = int(path.name) if path.parent.name == "checkpoints" and path.name.isdigit() else None
    settings = {"weights": str(path), "step": step, "length": length, "stride": stride, "dtype": dtype}
    sizes = {"documents": result.documents, "bytes": result.bytes, "tokens": result.tokens}
    numbers = {"loss": result.loss, "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
    return settings | {"data": str(texts.data)} | sizes | numbers | {"tokens_per_second": result.tokens / seconds}


def encoded(texts: Texts, tokenizer: Tokenizer, config: Config) -> tuple[list[tuple[list[int], int]], list[str]]:
    """Each document's token ids behind the one that begins a text, and its bytes; and what is left out, a line each."""
    begin = config.bos_token_id if config.bos_token_id is not None else tokenizer.eos_token_id
    opening = tokenizer.prefix_ids or [i for i in (begin,) if i is not None]
    if not opening:
        raise UsageError("neither the config nor the tokenizer names a token that begins a text")
    bad_text, special = BadTextHandler(texts.on_bad_text, tokenizer.unencodable), SpecialTokens(tokenizer)
    selected, rows = select_files(texts.data, texts.text_column, splits=("test", "validation")), []
    for file in selected.files:
        for text in filter(None, documents(file, texts.text_column, bad_text=bad_text)):
            if not texts.special_tokens:
                special.count(text)
            ids = tokenizer.encode(text, parse_special=texts.special_tokens)
            rows.append(([*opening, *ids], len(text.encode())))
    counted = sentences(counts_of(bad_text, special))
    if not rows:
        raise InputFileError(f"{texts.data}: {'; '.join(['holds no text', *counted])}")
    return rows, selected.notes + [f"{texts.data}: {sentence}" for sentence in counted]
