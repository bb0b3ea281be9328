"""Tokenizes one work unit of a data set into its token files, whose bytes depend on the unit and the job alone.

    python -m smollm_jax.data.prepare_worker JOB    # tokenizes the units it reads from stdin, reports on stdout

Imports no framework.
"""

import collections
import dataclasses
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
from smollm_jax.data.bad_text import BadTextHandler, Policy
from smollm_jax.data.file_types import FileSlice, TextChunk
from smollm_jax.data.text import text_chunks
from smollm_jax.data.text_counts import SpecialTokens, counts_of
from smollm_jax.data.token_file import write_token_file
from smollm_jax.errors import SmolLMError
from smollm_jax.tokenizer import Tokenizer

# Limits of a batch for one call of the tokenizer, which spreads it over its threads.
BATCH_CHUNKS, BATCH_CHARACTERS = 512, 1 << 21
OnProgress = Callable[[float, int], None]  # called with the source bytes and tokens done since the last call


@dataclasses.dataclass(frozen=True)
class Job:
    """The settings that all work units share."""

    folder: str
    tokenizer: str  # its folder
    tokenizer_sha256: str
    text_column: str
    shard_tokens: int
    cut: bool  # whether a long plain text may be encoded in chunks
    on_bad_text: Policy
    special_tokens: bool


@dataclasses.dataclass(frozen=True)
class WorkUnit:
    """File slices that become token files of their own, and how many of these are already on disk."""

    number: int
    slices: list[tuple[str, int, int]]  # file, start, stop: see `FileSlice`
    sizes: list[int]  # source bytes in each slice
    files_written: int = 0
    chunks_written: int = 0  # text chunks in these files

    def file_name(self, number: int) -> str:
        """The folder name of the unit's token file `number`."""
        return f"{self.number:06}-{number:04}"


class _ShardWriter:
    """Collects a unit's documents into token files of at least `shard_tokens` tokens each, except the last.

    A document with `shard_tokens` tokens or more is spread over files that contain nothing else.
    """

    def __init__(self, unit: WorkUnit, job: Job, eos: int):
        self._unit, self._folder, self._limit = unit, Path(job.folder), job.shard_tokens
        self._metadata = {"tokenizer_sha256": job.tokenizer_sha256, "eos_token_id": eos}
        self._files, self._chunks = unit.files_written, unit.chunks_written
        self._documents: list[np.ndarray] = []
        self._unfinished: list[np.ndarray] = []  # chunks of a document that has not ended
        self._document_tokens = self._unfinished_tokens = 0
        self._chunks_before = unit.chunks_written  # chunks before the unfinished document

    def add(self, ids: np.ndarray, ends: bool) -> None:
        """Appends the tokens of the next chunk, which `ends` its document or not."""
        # A file is written only once another chunk follows, so that the unit's last file is never empty: it alone
        # has "last" in its metadata.
        if self._documents and self._document_tokens + self._unfinished_tokens >= self._limit:
            self._write(self._documents, self._chunks_before if self._unfinished else self._chunks)
            self._documents, self._document_tokens = [], 0
        if self._unfinished_tokens >= self._limit:
            self._write([np.concatenate(self._unfinished)], self._chunks)
            self._unfinished, self._unfinished_tokens = [], 0
        if not self._unfinished:
            self._chunks_before = self._chunks
        self._chunks += 1
        self._unfinished.append(ids)
        self._unfinished_tokens += len(ids)
        if ends:
            self._documents.append(np.concatenate(self._unfinished))
            self._document_tokens += self._unfinished_tokens
            self._unfinished, self._unfinished_tokens = [], 0

    def finish(self, counts: dict[str, int]) -> None:
        """Writes the last file, with the unit's nonzero counts in its metadata."""
        self._metadata |= {"counts": counts} if counts else {}
        if self._unfinished:  # the document continues in the next unit, and this unit has no other document
            self._documents.append(np.concatenate(self._unfinished))
        if self._documents:
            self._write(self._documents, self._chunks, last=True)

    def _write(self, documents: list[np.ndarray], chunks: int, *, last: bool = False) -> None:
        position = {"unit": self._unit.number, "passages": chunks, "last": last}
        target, seed = self._folder / self._unit.file_name(self._files), (self._unit.number, self._files)
        write_token_file(target, documents, self._metadata | position, seed)
        self._files += 1


def tokenize_unit(unit: WorkUnit, job: Job, tokenizer: Tokenizer, on_progress: OnProgress) -> dict[str, int]:
    """Writes the token files of a unit that are not on disk yet; returns the counts of the whole unit."""
    eos = tokenizer.eos_token_id
    assert eos is not None
    bad_text, special = BadTextHandler(job.on_bad_text, tokenizer.unencodable), SpecialTokens(tokenizer)
    # With a prefix or suffix, `can_cut` is False: each chunk is a whole document.
    prefix, suffix = tokenizer.prefix_ids, tokenizer.suffix_ids
    writer, reported = _ShardWriter(unit, job, eos), 0.0
    for position, chunk, encoding in _encode_chunks(unit, job, tokenizer, bad_text, special):
        ids = [*prefix, *encoding.ids, *suffix] if prefix or suffix else encoding.ids
        already_ended = (job.special_tokens or suffix) and ids[-1] == eos  # the text itself may end with eos
        if chunk.ends and not already_ended:
            ids.append(eos)
        writer.add(np.array(ids, np.uint16), chunk.ends)
        on_progress(position - reported, len(ids))
        reported = position
    writer.finish(counts := counts_of(bad_text, special))
    on_progress(sum(unit.sizes) - reported, 0)
    return counts


def _encode_chunks(
    unit: WorkUnit, job: Job, tokenizer: Tokenizer, bad_text: BadTextHandler, special: SpecialTokens
) -> Iterator[tuple[float, TextChunk, Any]]:
    """Each chunk that is not on disk yet, with the source bytes read up to its end, and its encoding.

    Two batches are in the tokenizer at a time, so that its threads do not idle during the longest chunk of one batch,
    while this thread reads the next batch and the caller consumes the previous one.
    """
    tokenizer.core.encode_special_tokens = not job.special_tokens
    new_chunks = itertools.islice(_read_chunks(unit, job, bad_text, special), unit.chunks_written, None)
    in_flight: collections.deque[tuple[list[tuple[float, TextChunk]], Future[Any]]] = collections.deque()
    with ThreadPoolExecutor(2) as pool:
        while (batch := _next_batch(new_chunks)) or in_flight:
            if batch:
                in_flight.append((batch, pool.submit(tokenizer.encodings, [chunk.text for _, chunk in batch])))
            if len(in_flight) > 2 or not batch:
                oldest, encodings = in_flight.popleft()
                for (position, chunk), encoding in zip(oldest, encodings.result(), strict=True):
                    yield position, chunk, encoding


def _read_chunks(
    unit: WorkUnit, job: Job, bad_text: BadTextHandler, special: SpecialTokens
) -> Iterator[tuple[float, TextChunk]]:
    """All chunks of a unit that are not empty, each with the source bytes read up to its end.

    Chunks that are on disk are read again, so that the unit's counts do not depend on where an earlier start stopped.
    """
    read = 0
    for (file, start, stop), size in zip(unit.slices, unit.sizes, strict=True):
        for chunk in text_chunks(FileSlice(Path(file), start, stop), job.text_column, cut=job.cut, bad_text=bad_text):
            if chunk.text:
                if not job.special_tokens:
                    special.count(chunk.text, chunk.ends)
                yield read + chunk.position * size, chunk
        read += size


def _next_batch(chunks: Iterator[tuple[float, TextChunk]]) -> list[tuple[float, TextChunk]]:
    batch, characters = [], 0
    for position, chunk in itertools.islice(chunks, BATCH_CHUNKS):
        batch.append((position, chunk))
        characters += len(chunk.text)
        if characters >= BATCH_CHARACTERS:
            break
    return batch


def main() -> None:
    job, parent = Job(**json.loads(sys.argv[1])), os.getppid()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print to stdout goes to stderr: the parent parses each line of stdout

    def reply(**content: Any) -> None:
        print(json.dumps(content), file=replies, flush=True)

    unreported = {"bytes": 0.0, "tokens": 0}
    reported_at = time.monotonic()

    def on_progress(size: float, tokens: int) -> None:
        nonlocal reported_at
        unreported["bytes"] += size
        unreported["tokens"] += tokens
        if time.monotonic() - reported_at < 0.1:
            return
        if os.getppid() != parent:  # the parent was killed, and another preparation may use this folder by now
            os._exit(1)
        reply(**unreported)
        unreported.update(bytes=0.0, tokens=0)
        reported_at = time.monotonic()

    try:
        tokenizer = Tokenizer.load(job.tokenizer)
        for line in sys.stdin:
            unit = WorkUnit(**json.loads(line))
            counts = tokenize_unit(unit, job, tokenizer, on_progress)
            reply(done=unit.number, counts=counts, **unreported)
            unreported.update(bytes=0.0, tokens=0)
    except SmolLMError as error:
        error_name = next(cls.__name__ for cls in type(error).__mro__ if hasattr(errors, cls.__name__))
        reply(error=[error_name, str(error)])


if __name__ == "__main__":
    main()
