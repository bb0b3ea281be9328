"""How fast text becomes a data set, by as many processes as there are cores, and how fast `tokenizers` alone is."""

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from job import Job, Prepared

from smollm_jax.plan import Settings, make_plan
from smollm_jax.prepare import prepare_set
from smollm_jax.text import documents, text_files
from smollm_jax.token_file import TokenSet
from smollm_jax.tokenizer import Tokenizer

TOKENIZER = Path(__file__).resolve().parent.parent.parent / "assets/tokenizer"
WALL, CPU = "MB/s", "MB/s of a core"


def prepare(_name: str, job: Job, source: Path) -> Prepared:
    """No unit of work: what this side says once it is ready is all, MB/s by name, round by round, in turn.

    Ours is all of it: starting the processes, reading, encoding, shuffling, writing and reading again. The other is
    one call of `encode_batch_fast`, on all threads, with all texts in memory; the first round is left out.
    """
    tokenizer = Tokenizer.load(TOKENIZER)
    texts = job.copies * [text for file in text_files(source) for text in documents(file)]
    size, cores = sum(len(text.encode()) for text in texts), len(os.sched_getaffinity(0))
    tokenizer.core.encode_special_tokens = True
    rates: dict[str, dict[str, list[float]]] = {name: {"ours": [], "tokenizers": []} for name in (WALL, CPU)}

    def timed(name: str, work: Callable[[], int]) -> int:
        began, busy = time.perf_counter(), cpu_seconds()
        tokens = work()
        rates[WALL][name].append(size / 1e6 / (time.perf_counter() - began))
        rates[CPU][name].append(size / 1e6 / (cpu_seconds() - busy))
        return tokens

    def encode() -> int:
        return sum(len(found.ids) + 1 for found in tokenizer.core.encode_batch_fast(texts, add_special_tokens=False))

    def to_set(folder: str) -> int:
        settings = Settings(TOKENIZER)
        prepare_set(Path(folder), make_plan(sources, settings), settings)
        return TokenSet.open(Path(folder)).tokens

    with tempfile.TemporaryDirectory(dir=".") as copies:  # no links: a file is read once, whatever names it has
        sources = [Path(copies, f"{copy}-{source.name}") for copy in range(job.copies)]
        for copy in sources:
            shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
        for number in range(job.rounds + 1):
            with tempfile.TemporaryDirectory(dir=".") as folder:
                tokens = timed("tokenizers", encode), timed("ours", lambda place=folder: to_set(place))
            assert tokens[0] == tokens[1], f"round {number}"
    measured = {what: {name: of[1:] for name, of in rate.items()} for what, rate in rates.items()}
    return dict, lambda: 0, {"device": f"{cores} cores", "rates": measured}


def cpu_seconds() -> float:
    """Of this process and of those it waited for: what a busy machine does not change."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)
