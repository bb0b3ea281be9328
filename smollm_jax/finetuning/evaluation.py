"""How well weights predict the answers of chats, and whether they prefer the chosen answer of a pair."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smollm_jax import weights
from smollm_jax.data.bad_text import Policy
from smollm_jax.data.examples.examples import Learn, kind_of_first_row, read_examples, read_pairs
from smollm_jax.data.examples.packing import packed, pair_length, paired
from smollm_jax.finetuning.chat_format import chat_tokenizer
from smollm_jax.finetuning.objectives import LearntTokens, answer_log_probs
from smollm_jax.model.smollm import SmolLM
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.training.execution import ExecutionConfig

ROWS = 4  # a batch


def measure(
    path: Path,
    sources: Sequence[str],
    *,
    learn: Learn | None = None,
    length: int | None = None,
    dtype: str = "float32",
    tokenizer_path: Path | None = None,
    adapter: Path | None = None,
    on_bad_text: Policy = "stop",
) -> dict[str, Any]:
    """The loss of a set of weights on the learnt tokens of examples, in nats per token, as a row of a table.

    For preference pairs the loss is that of the chosen answers, and "accuracy" the share of pairs whose chosen answer
    has the larger log-probability, summed over its tokens. `length` (None: the context, at most 2,048) is tokens; a
    longer example loses its end, which "truncated" counts. Raises as `read_examples` does.
    """
    tokenizer = chat_tokenizer(Tokenizer.of_weights(path, tokenizer_path))
    model, config = weights.load(path, jnp.dtype(dtype), adapter)
    length = min(length or 2048, config.max_position_embeddings)
    execution = ExecutionConfig(dtype, separator_id=tokenizer.eos_token_id)
    result: dict[str, Any] = {"weights": str(path), "data": " ".join(sources), "length": length, "dtype": dtype}
    if kind_of_first_row(sources) == "preference pair":
        pairs, report = read_pairs(sources, tokenizer, max_length=length, on_bad_text=on_bad_text)
        rows = paired(pairs, pair_length(pairs))
        sums = [np.asarray(log_probs(model, batch, execution=execution))[:count] for batch, count in _batches(rows)]
        chosen, rejected = np.concatenate(sums).T.astype(np.float64)
        tokens = int((rows.targets[:, 0] >= 0).sum())
        loss, extra = -chosen.sum() / tokens, {"pairs": len(pairs), "accuracy": float((chosen > rejected).mean())}
    else:
        examples, report = read_examples(
            sources, tokenizer, learn=learn or "assistant", max_length=length, on_bad_text=on_bad_text
        )
        rows = packed(examples, length)
        totals = [float(total(model, batch, execution=execution)) for batch, _ in _batches(rows)]
        tokens = int((rows.targets >= 0).sum())
        loss, extra = sum(totals) / tokens, {"examples": len(examples)}
    result |= extra | {"truncated": report.truncated, "tokens": tokens, "loss": float(loss)}
    return result | {"perplexity": float(np.exp(loss))}


log_probs = jax.jit(answer_log_probs, static_argnames="execution")


@functools.partial(jax.jit, static_argnames="execution")
def total(model: SmolLM, batch: dict[str, Array], *, execution: ExecutionConfig) -> Float[Array, ""]:
    """The summed loss of a batch of rows."""
    return LearntTokens().total(model, batch, execution, None)[0]


def _batches(rows: Any) -> Any:
    """Batches of `ROWS` rows on the device, each with how many of them are no padding."""
    for start in range(0, len(rows), ROWS):
        arrays = rows[start : start + ROWS].arrays()
        count = len(arrays["tokens"])
        padding = {name: [(0, ROWS - count)] + [(0, 0)] * (array.ndim - 1) for name, array in arrays.items()}
        padded = {name: np.pad(array, padding[name], constant_values=-1) for name, array in arrays.items()}
        yield {name: jnp.asarray(array) for name, array in padded.items()}, count
