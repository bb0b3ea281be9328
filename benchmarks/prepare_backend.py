"""The backends of "prepare", which tokenise text on all cores: ours, `datasets`, and `tokenizers` alone."""

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
    """A unit of work tokenises the files and folders in `source`; it returns seconds, CPU seconds and tokens."""
    work = {"ours": ours, "datasets": with_datasets, "tokenizers": tokenizers_alone}[name](source)

    def unit() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=source.parent) as out:
            began, busy = time.perf_counter(), cpu_seconds()
            tokens = work(Path(out))
            return {"seconds": time.perf_counter() - began, "cpu": cpu_seconds() - busy, "tokens": tokens}

    return unit, lambda: 0, {"device": f"{len(os.sched_getaffinity(0))} cores"}


def ours(source: Path) -> Work:
    """All that prepare_data.py does, from loading the tokenizer and starting processes to opening the result."""

    def work(out: Path) -> int:
        settings = Settings(TOKENIZER)
        build_dataset(out, make_plan(sorted(source.iterdir()), settings), settings)
        return TokenSet.open(out).tokens

    return work


def with_datasets(source: Path) -> Work:
    """`load_dataset`, then `map` with one process per core, both writing Arrow files. A plain text file is one row.

    Each process has one tokenizer thread (the parent sets TOKENIZERS_PARALLELISM).
    """
    import datasets

    eos = Tokenizer.load(TOKENIZER).eos_token_id
    is_plain = next(source.rglob("*.txt"), None) is not None
    options: dict[str, Any] = {"path": "text", "sample_by": "document"} if is_plain else {"path": "json"}

    def work(out: Path) -> int:
        core = tokenizers.Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))

        def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
            core.encode_special_tokens = True  # set here: pickling for the processes loses it
            return {"ids": [[*x.ids, eos] for x in core.encode_batch_fast(batch["text"], add_special_tokens=False)]}

        rows: Any = datasets.load_dataset(**options, data_files=f"{source}/**", split="train", cache_dir=str(out))
        cores = len(os.sched_getaffinity(0))
        rows = rows.map(tokenize, batched=True, num_proc=cores, remove_columns=rows.column_names)
        return sum(len(chunk.flatten()) for chunk in rows.data.column("ids").chunks)

    return work


def tokenizers_alone(source: Path) -> Work:
    """One call of `encode_batch_fast` on all threads, with all texts in memory; it writes nothing."""
    core = Tokenizer.load(TOKENIZER).core
    core.encode_special_tokens = True
    texts = [text for each in sorted(source.iterdir()) for file in text_files(each) for text in documents(file)]
    return lambda _: sum(len(encoding.ids) + 1 for encoding in core.encode_batch_fast(texts, add_special_tokens=False))


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children, which other load hardly changes."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
