"""How fast text becomes a data set, by as many processes as there are cores, and how fast `tokenizers` alone is."""

import os
import tempfile
import time
from pathlib import Path

from job import Job, Prepared

from smollm_jax.plan import Settings, make_plan
from smollm_jax.prepare import prepare_set
from smollm_jax.text import documents, text_files
from smollm_jax.token_file import TokenSet
from smollm_jax.tokenizer import Tokenizer

TOKENIZER = Path(__file__).resolve().parent.parent.parent / "assets/tokenizer"
UNITS = 8  # for each core, as a large data set has more


def prepare(_name: str, job: Job, source: Path) -> Prepared:
    """No unit of work: what this side says once it is ready is all, MB/s by name, round by round, in turn.

    Ours is all of it: starting the processes, reading, encoding, shuffling, writing and the manifest. The other is one
    call of `encode_batch_fast`, on all threads, with all texts in memory; its first, which starts them, is left out.
    """
    tokenizer = Tokenizer.load(TOKENIZER)
    texts = [text for file in text_files(source) for text in documents(file)]
    size, cores = sum(len(text.encode()) for text in texts), len(os.sched_getaffinity(0))
    tokenizer.core.encode_special_tokens = True
    rates: dict[str, list[float]] = {"ours": [], "tokenizers": []}
    for number in range(job.rounds + 1):
        began = time.perf_counter()
        found = tokenizer.core.encode_batch_fast(texts, add_special_tokens=False)
        rates["tokenizers"].append(size / 1e6 / (time.perf_counter() - began))
        expected = sum(len(encoding.ids) + 1 for encoding in found)
        del found
        with tempfile.TemporaryDirectory(dir=".") as folder:
            began = time.perf_counter()
            settings = Settings(TOKENIZER, shard_tokens=max(1, size // (4 * UNITS * cores)))
            prepare_set(Path(folder), make_plan([source], settings), settings)
            rates["ours"].append(size / 1e6 / (time.perf_counter() - began))
            assert TokenSet.open(Path(folder)).tokens == expected, f"round {number}: not the same work"
    return dict, lambda: 0, {"device": f"{cores} cores", "rates": {name: of[1:] for name, of in rates.items()}}
