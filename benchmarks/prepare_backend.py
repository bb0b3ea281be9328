"""How fast text becomes a data set, on all cores: ours, `datasets`, and `tokenizers` alone."""

import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from benchmarks.workload import Prepared, Workload
from smollm_jax.data.plan import Settings, make_plan
from smollm_jax.data.prepare import build_dataset
from smollm_jax.data.text import documents
from smollm_jax.data.text_sources import text_files
from smollm_jax.data.token_file import TokenSet
from smollm_jax.tokenizer import Tokenizer

TOKENIZER = Path(__file__).resolve().parents[1] / "assets/tokenizer"
Work = Callable[[Path], int]  # writes to an empty folder; returns the number of tokens


def prepare(name: str, _workload: Workload, source: Path) -> Prepared:
    """A unit of work is one data set of the files and folders in `source`; it says seconds, CPU seconds and tokens."""
    work = {"ours": ours, "datasets": with_datasets, "tokenizers": tokenizers_alone}[name](source)

    def unit() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=source.parent) as out:
            began, busy = time.perf_counter(), cpu_seconds()
            tokens = work(Path(out))
            return {"seconds": time.perf_counter() - began, "cpu": cpu_seconds() - busy, "tokens": tokens}

    return unit, lambda: 0, {"device": f"{len(os.sched_getaffinity(0))} cores"}


def ours(source: Path) -> Work:
    """All of it: loading the tokenizer, starting processes, reading, encoding, shuffling, writing, reading again."""

    def work(out: Path) -> int:
        settings = Settings(TOKENIZER)
        build_dataset(out, make_plan(sorted(source.iterdir()), settings), settings)
        return TokenSet.open(out).tokens

    return work


def with_datasets(source: Path) -> Work:
    """`load_dataset` and `map` by a process a core, both written as Arrow in the empty folder; a plain text is a row.

    In each process the tokenizer has one thread (the parent sets TOKENIZERS_PARALLELISM).
    """
    import datasets

    eos = Tokenizer.load(TOKENIZER).eos_token_id
    is_plain = next(source.rglob("*.txt"), None) is not None
    how: dict[str, Any] = {"path": "text", "sample_by": "document"} if is_plain else {"path": "json"}

    def work(out: Path) -> int:
        core = tokenizers.Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))

        def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
            core.encode_special_tokens = True  # here: pickling, on the way to the processes, loses it
            return {"ids": [[*x.ids, eos] for x in core.encode_batch_fast(batch["text"], add_special_tokens=False)]}

        rows: Any = datasets.load_dataset(**how, data_files=f"{source}/**", split="train", cache_dir=str(out))
        cores = len(os.sched_getaffinity(0))
        rows = rows.map(tokenize, batched=True, num_proc=cores, remove_columns=rows.column_names)
        return sum(len(chunk.flatten()) for chunk in rows.data.column("ids").chunks)

    return work


def tokenizers_alone(source: Path) -> Work:
    """One call of `encode_batch_fast`, on all threads, with all texts in memory; nothing is written."""
    core = Tokenizer.load(TOKENIZER).core
    core.encode_special_tokens = True
    texts = [text for each in sorted(source.iterdir()) for file in text_files(each) for text in documents(file)]
    return lambda _: sum(len(found.ids) + 1 for found in core.encode_batch_fast(texts, add_special_tokens=False))


def cpu_seconds() -> float:
    """Of this process and of those it waited for: what a busy machine does not change."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)
