"""One unit of the preparation of a data set: some text to some token files, the same ones whoever does it and when.

    python -m smollm_jax.prepare_worker JOB    # does the units it reads from stdin, says how far it is on stdout

Imports no framework.
"""

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax.errors import InputFileError, SmolLMError, UsageError
from smollm_jax.text import Part, Passage, passages
from smollm_jax.token_file import write_token_file
from smollm_jax.tokenizer import Tokenizer

AT_ONCE = (256, 1 << 22)  # passages and characters in a call into the tokenizer, which spreads them over its threads
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

    def end(self) -> None:
        """Writes what is left, which is whole documents or a piece of one."""
        if self._pieces:  # the document goes on in another unit, which is why this one holds nothing else
            self._documents.append(np.concatenate(self._pieces))
        if self._documents:
            self._write(self._documents, self._passages, last=True)

    def _write(self, documents: list[np.ndarray], passages: int, *, last: bool = False) -> None:
        place = {"unit": self._unit.number, "passages": passages, "last": last}
        target, seed = self._folder / self._unit.file_name(self._files), (self._unit.number, self._files)
        write_token_file(target, documents, self._about | place, seed)
        self._files += 1


def prepare_unit(unit: Unit, job: Job, tokenizer: Tokenizer, tell: Tell) -> None:
    """Writes a unit's token files, but for those that are written."""
    eos = tokenizer.eos_token_id
    assert eos is not None
    writer, before, missing = _Writer(unit, job, eos), 0.0, unit.passages
    passages_ = _passages(unit, job)
    while batch := _next(passages_):
        found, position = [passage for _, passage in batch[missing:]], batch[-1][0]
        missing = max(0, missing - len(batch))
        tokens = 0
        for passage, ids in zip(found, _encoded(found, tokenizer), strict=True):
            if passage.ends:
                ids.append(eos)
            writer.add(np.array(ids, np.uint16), passage.ends)
            tokens += len(ids)
        tell(position - before, tokens)
        before = position
    writer.end()
    tell(sum(unit.sizes) - before, 0)


def _encoded(found: list[Passage], tokenizer: Tokenizer) -> list[list[int]]:
    try:
        return tokenizer.encode_batch([passage.text for passage in found])
    except UsageError as error:
        for passage in found:
            if reason := tokenizer.unencodable(passage.text):
                raise InputFileError(f"{passage.where} cannot be encoded: {reason}") from error
        raise


def _passages(unit: Unit, job: Job) -> Iterator[tuple[float, Passage]]:
    """All passages with text in them, and how many bytes of the unit's source are read by then."""
    read = 0
    for (file, start, stop), size in zip(unit.parts, unit.sizes, strict=True):
        for passage in passages(Part(Path(file), start, stop), job.text_column, cut=job.cut):
            if passage.text:
                yield read + passage.position * size, passage
        read += size


def _next(found: Iterator[tuple[float, Passage]]) -> list[tuple[float, Passage]]:
    batch, characters = [], 0
    for one in itertools.islice(found, AT_ONCE[0]):
        batch.append(one)
        characters += len(one[1].text)
        if characters >= AT_ONCE[1]:
            break
    return batch


def main() -> None:
    job, parent = Job(**json.loads(sys.argv[1])), os.getppid()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    def tell(size: float, tokens: int) -> None:
        if os.getppid() != parent:  # killed: another preparation may be at work by now
            os._exit(1)
        say(bytes=size, tokens=tokens)

    try:
        tokenizer = Tokenizer.load(job.tokenizer)
        for line in sys.stdin:
            prepare_unit(Unit(**json.loads(line)), job, tokenizer, tell)
            say(done=True)
    except SmolLMError as error:
        say(error=[type(error).__name__, str(error)])


if __name__ == "__main__":
    main()
