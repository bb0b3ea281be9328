"""How well a model predicts a text: loss, perplexity and bits per byte, with a sliding window."""

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
    """How well a model predicts a text; `nats` is the summed negative log-likelihood of its tokens."""

    nats: float
    tokens: int
    bytes: int
    documents: int

    @property
    def loss(self) -> float:
        """Nats per token; depends on the tokenizer."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte, comparable across tokenizers (Gao et al. 2020, The Pile, section 3.1)."""
        return bits_per_byte(self.loss, self.bytes / self.tokens)


@dataclasses.dataclass(frozen=True)
class Texts:
    """The documents to evaluate on, and how to read them: see the flags of `evaluate`."""

    data: Path
    text_column: str = "text"
    on_bad_text: Literal["stop", "skip", "replace"] = "stop"
    special_tokens: bool = False


def windows(tokens: Sequence[int], length: int, stride: int) -> Iterator[Request]:
    """Requests that score each token of a document after the first once, in windows of at most `length` inputs.

    Each window starts `stride` tokens after the one before and scores the tokens that no earlier one did, each after at
    least `length - stride` tokens of context.
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
    """The quality on documents, given as (token ids, bytes of text); a document's first id is not scored.

    Raises `UsageError` for a stride outside 1 to `length` (tokens would be skipped), for a length beyond the model's
    context, and if there is no token to score.
    """
    if not 1 <= length <= model.config.max_position_embeddings:
        raise UsageError(
            f"--length must be from 1 to the context of {model.config.max_position_embeddings}, got {length}"
        )
    if not 1 <= stride <= length:
        raise UsageError(f"--stride must be from 1 to the length of {length}, got {stride}")
    requests: list[Request] = []
    total_bytes = count = 0
    for ids, text_bytes in documents:
        requests += windows(ids, length, stride)
        total_bytes, count = total_bytes + text_bytes, count + 1
    tokens = sum(len(request.continuation) for request in requests)
    if not tokens or not total_bytes:
        raise UsageError("the text has no token to score")
    nats = -math.fsum(result.logprob for result in score(model, requests, progress=progress))
    return Quality(nats, tokens, total_bytes, count)


def measure(
    path: Path,
    texts: Texts,
    *,
    length: int | None,
    stride: int | None,
    dtype: str,
    tokenizer_path: Path | None,
    printed: set[str],
    adapter: Path | None = None,
) -> dict[str, Any]:
    """The quality of one set of weights on the texts, as a row of a table.

    `length` (None: the context, at most 2,048) and `stride` (None: half of the length) are tokens. Prints on stderr
    which text is skipped, unless that line is in `printed`, which it updates.
    """
    tokenizer = Tokenizer.of_weights(path, tokenizer_path)
    model, config = weights.load(path, jnp.dtype(dtype), adapter)
    length = length or min(2048, config.max_position_embeddings)
    stride = stride or max(1, length // 2)
    documents, notes = encode_documents(texts, tokenizer, config)
    for line in notes:
        if line not in printed:
            print(line, file=sys.stderr)
    printed.update(notes)
    total = sum(len(ids) - 1 for ids, _ in documents)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(str(path), total=total)
        start = time.perf_counter()
        result = quality(
            model, documents, length=length, stride=stride, progress=lambda tokens: bar.advance(task, tokens)
        )
        seconds = time.perf_counter() - start
    step = int(path.name) if path.parent.name == "checkpoints" and path.name.isdigit() else None
    settings = {"weights": str(path), "step": step, "length": length, "stride": stride, "dtype": dtype}
    sizes = {"documents": result.documents, "bytes": result.bytes, "tokens": result.tokens}
    numbers = {"loss": result.loss, "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
    return settings | {"data": str(texts.data)} | sizes | numbers | {"tokens_per_second": result.tokens / seconds}


def encode_documents(
    texts: Texts, tokenizer: Tokenizer, config: Config
) -> tuple[list[tuple[list[int], int]], list[str]]:
    """Each document's token ids after a bos (or else eos) token and its bytes; and notes on skipped text."""
    bos = config.bos_token_id if config.bos_token_id is not None else tokenizer.eos_token_id
    prefix = tokenizer.prefix_ids or [i for i in (bos,) if i is not None]
    if not prefix:
        raise UsageError("neither the config nor the tokenizer has a bos or eos token to start a document with")
    bad_text, special = BadTextHandler(texts.on_bad_text, tokenizer.unencodable), SpecialTokens(tokenizer)
    selected, rows = select_files(texts.data, texts.text_column, splits=("test", "validation")), []
    for file in selected.files:
        for text in filter(None, documents(file, texts.text_column, bad_text=bad_text)):
            if not texts.special_tokens:
                special.count(text)
            ids = tokenizer.encode(text, parse_special=texts.special_tokens)
            rows.append(([*prefix, *ids], len(text.encode())))
    skipped = sentences(counts_of(bad_text, special))
    if not rows:
        raise InputFileError(f"{texts.data}: {'; '.join(['holds no text', *skipped])}")
    return rows, selected.notes + [f"{texts.data}: {sentence}" for sentence in skipped]
