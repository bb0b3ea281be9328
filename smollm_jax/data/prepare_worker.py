"""One unit of the preparation of a data set: some text to some token files, the same ones whoever does it and when.

    python -m smollm_jax.data.prepare_worker JOB    # does the units it reads from stdin, says how far it is on stdout

Imports no framework.
"""

import collections
import dataclasses
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax import errors
from smollm_jax.data.bad_text import BadText, Policy
from smollm_jax.data.text import passages
from smollm_jax.data.text_counts import SpecialTokens, counts_of
from smollm_jax.data.text_kinds import Part, Passage
from smollm_jax.data.token_file import write_token_file
from smollm_jax.errors import SmolLMError
from smollm_jax.tokenizer import Tokenizer

AT_ONCE = (512, 1 << 21)  # passages and characters in a call into the tokenizer, which spreads them over its threads
Tell = Callable[[float, int], None]  # takes how many bytes of the source and how many tokens more are done


@dataclasses.dataclass(frozen=True)
class Job:
    """What is the same for every unit."""

    folder: str
    tokenizer: str  # folder
    tokenizer_sha256: str
    text_column: str
    shard_tokens: int
    cut: bool  # whether a long plain text may be encoded in pieces
    on_bad_text: Policy
    special_tokens: bool


@dataclasses.dataclass(frozen=True)
class Unit:
    """Parts of files that become token files of their own, and how far they did."""

    number: int
    parts: list[tuple[str, int, int]]
    sizes: list[int]  # bytes of the source in each part
    files: int = 0  # that are written
    passages: int = 0  # that are in them

    def file_name(self, number: int) -> str:
        """The name of one of its token files."""
        return f"{self.number:06}-{number:04}"


class _Writer:
    """Gathers a unit's documents into files of at least `shard_tokens` tokens each, but for the last.

    A document that is as long as that by itself is spread over files that hold nothing else.
    """

    def __init__(self, unit: Unit, job: Job, eos: int):
        self._unit, self._folder, self._limit = unit, Path(job.folder), job.shard_tokens
        self._about = {"tokenizer_sha256": job.tokenizer_sha256, "eos_token_id": eos}
        self._files, self._passages = unit.files, unit.passages
        self._documents: list[np.ndarray] = []
        self._pieces: list[np.ndarray] = []  # of a document that has not ended
        self._lengths = [0, 0]  # of those two, in tokens
        self._before = unit.passages  # passages that came before that document

    def add(self, ids: np.ndarray, ends: bool) -> None:
        """Takes the tokens of the next passage."""
        # Files are written before it is taken in, so that the unit's last one is not empty and can say that it is.
        if self._documents and sum(self._lengths) >= self._limit:
            self._write(self._documents, self._before if self._pieces else self._passages)
            self._documents, self._lengths[0] = [], 0
        if self._lengths[1] >= self._limit:
            self._write([np.concatenate(self._pieces)], self._passages)
            self._pieces, self._lengths[1] = [], 0
        if not self._pieces:
            self._before = self._passages
        self._passages += 1
        self._pieces.append(ids)
        self._lengths[1] += len(ids)
        if ends:
            self._documents.append(np.concatenate(self._pieces))
            self._pieces, self._lengths = [], [self._lengths[0] + self._lengths[1], 0]

    def end(self, counts: dict[str, int]) -> None:
        """Writes what is left, which is whole documents or a piece of one, and with it what was counted, if not 0."""
        self._about |= {"counts": counts} if counts else {}
        if self._pieces:  # the document goes on in another unit, which is why this one holds nothing else
            self._documents.append(np.concatenate(self._pieces))
        if self._documents:
            self._write(self._documents, self._passages, last=True)

    def _write(self, documents: list[np.ndarray], passages: int, *, last: bool = False) -> None:
        place = {"unit": self._unit.number, "passages": passages, "last": last}
        target, seed = self._folder / self._unit.file_name(self._files), (self._unit.number, self._files)
        write_token_file(target, documents, self._about | place, seed)
        self._files += 1


def prepare_unit(unit: Unit, job: Job, tokenizer: Tokenizer, tell: Tell) -> dict[str, int]:
    """Writes a unit's token files, but for those that are written, and returns what it counted."""
    eos = tokenizer.eos_token_id
    assert eos is not None
    bad, special = BadText(job.on_bad_text, tokenizer.unencodable), SpecialTokens(tokenizer)
    prefix, suffix = tokenizer.prefix_ids, tokenizer.suffix_ids  # of a whole document: `may_cut` has no other then
    writer, before = _Writer(unit, job, eos), 0.0
    for position, passage, encoding in _encoded(unit, job, tokenizer, bad, special):
        ids = [*prefix, *encoding.ids, *suffix] if prefix or suffix else encoding.ids
        if passage.ends and not ((job.special_tokens or suffix) and ids[-1] == eos):  # which the text may say itself
            ids.append(eos)
        writer.add(np.array(ids, np.uint16), passage.ends)
        tell(position - before, len(ids))
        before = position
    writer.end(counts := counts_of(bad, special))
    tell(sum(unit.sizes) - before, 0)
    return counts


def _encoded(
    unit: Unit, job: Job, tokenizer: Tokenizer, bad: BadText, special: SpecialTokens
) -> Iterator[tuple[float, Passage, Any]]:
    """Every passage that is not written yet, how many bytes of the source are read by then, and its encoding.

    The tokenizer has two batches, so that its threads need not wait for the longest passage of one of them, while
    this thread reads the next and its caller works on the one before.
    """
    tokenizer.core.encode_special_tokens = not job.special_tokens
    encode = functools.partial(tokenizer.core.encode_batch_fast, add_special_tokens=False)
    found = itertools.islice(_passages(unit, job, bad, special), unit.passages, None)
    under_way: collections.deque[tuple[list[tuple[float, Passage]], Future[Any]]] = collections.deque()
    with ThreadPoolExecutor(2) as pool:
        while (batch := _next(found)) or under_way:
            if batch:
                under_way.append((batch, pool.submit(encode, [passage.text for _, passage in batch])))
            if len(under_way) > 2 or not batch:
                first, encodings = under_way.popleft()
                for (position, passage), encoding in zip(first, encodings.result(), strict=True):
                    yield position, passage, encoding


def _passages(unit: Unit, job: Job, bad: BadText, special: SpecialTokens) -> Iterator[tuple[float, Passage]]:
    """All passages with text in them, and how many bytes of the unit's source are read by then.

    Those that are written are read again, so that what is counted of a unit does not depend on where it was stopped.
    """
    read = 0
    for (file, start, stop), size in zip(unit.parts, unit.sizes, strict=True):
        for passage in passages(Part(Path(file), start, stop), job.text_column, cut=job.cut, bad=bad):
            if passage.text:
                if not job.special_tokens:
                    special.see(passage.text, passage.ends)
                yield read + passage.position * size, passage
        read += size


def _next(found: Iterator[tuple[float, Passage]]) -> list[tuple[float, Passage]]:
    """The passages of the next batch."""
    batch, characters = [], 0
    for position, passage in itertools.islice(found, AT_ONCE[0]):
        batch.append((position, passage))
        characters += len(passage.text)
        if characters >= AT_ONCE[1]:
            break
    return batch


def main() -> None:
    job, parent = Job(**json.loads(sys.argv[1])), os.getppid()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    told = {"bytes": 0.0, "tokens": 0, "at": time.monotonic()}

    def tell(size: float, tokens: int) -> None:
        told["bytes"] += size
        told["tokens"] += tokens
        if time.monotonic() - told["at"] < 0.1:
            return
        if os.getppid() != parent:  # killed: another preparation may be at work by now
            os._exit(1)
        say(bytes=told["bytes"], tokens=told["tokens"])
        told.update(bytes=0.0, tokens=0, at=time.monotonic())

    try:
        tokenizer = Tokenizer.load(job.tokenizer)
        for line in sys.stdin:
            unit = Unit(**json.loads(line))
            counts = prepare_unit(unit, job, tokenizer, tell)
            say(done=unit.number, counts=counts, bytes=told["bytes"], tokens=told["tokens"])
            told.update(bytes=0.0, tokens=0)
    except SmolLMError as error:
        kind = next(kind.__name__ for kind in type(error).__mro__ if hasattr(errors, kind.__name__))
        say(error=[kind, str(error)])


if __name__ == "__main__":
    main()
