"""The work of `benchmark.py finetune`: chats of the demo set, each with what is learnt of it. Imports no framework."""

import itertools
from pathlib import Path

import numpy as np

from benchmarks.compare import ROOT
from benchmarks.workload import Workload
from smollm_jax.config.finetune_recipe import FinetuneRecipe
from smollm_jax.data.examples.examples import Example, Pair, read_examples
from smollm_jax.errors import UsageError
from smollm_jax.finetuning.chat_format import chat_tokenizer
from smollm_jax.tokenizer import Tokenizer

CHATS = ROOT / "assets/chats/chats.jsonl"
STEPS = 4  # a unit of work: every step has other tokens
EXAMPLES, PAIRS = 400, 64
RANK = 16


def recipe(workload: Workload, *, packing: bool) -> FinetuneRecipe:
    """The settings that every backend gets."""
    adapter = {"lora_rank": RANK, "lora_alpha": 2.0 * RANK} if workload.method == "lora" else {}
    return FinetuneRecipe(
        steps=100_000,
        batch_size=workload.batch_size,
        sequence_length=workload.sequence_length,
        learning_rate=1e-5,
        warmup_steps=0,
        dtype=workload.dtype,
        method="dpo" if workload.method == "dpo" else "sft",
        packing=packing and workload.method != "dpo",
        **adapter,
    )


def examples(workload: Workload) -> list[Example]:
    """The first chats of the demo set, cut to the sequence length."""
    if not CHATS.is_file():
        raise UsageError(f"{CHATS}: no such file: python scripts/fetch_assets.py chats")
    tokenizer = chat_tokenizer(Tokenizer.load(ROOT / "assets/tokenizer"))
    return read_examples([Path(CHATS)], tokenizer, max_length=workload.sequence_length, most=EXAMPLES)[0]


def pairs(workload: Workload) -> list[Pair]:
    """Pairs of a chat and the same chat with the answers of another one after the first question."""
    made = []
    for one, other in itertools.pairwise(examples(workload)):
        start = int(one.learnt.argmax())
        answer = other.ids[other.learnt][: max(8, len(one.ids) - start)]
        ids = np.concatenate([one.ids[:start], answer])[: workload.sequence_length]
        made.append(Pair(completed(one.ids, start), completed(ids, start)))
    return made[:PAIRS]


def completed(ids: np.ndarray, start: int) -> Example:
    """An example of which all tokens from `start` on are learnt."""
    return Example(ids, np.arange(len(ids)) >= start)
