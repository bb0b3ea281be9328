"""Batches of token windows from prepared data. Imports no framework.

A batch is a pure function of (recipe, data, step, rows): there is no reader state to save, and each of several
processes reads only its own rows.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from smollm_jax.config import Recipe
from smollm_jax.data.mixture import Interleaver, Mixture
from smollm_jax.data.shuffle import permute
from smollm_jax.data.token_file import TokenFile, TokenSet
from smollm_jax.errors import InputFileError


@dataclasses.dataclass(frozen=True)
class Window:
    """The position of T + 1 tokens: the token file, and the index of the first token in it."""

    file: TokenFile
    start: int

    def __str__(self) -> str:
        return f"{self.file.path.parent}:{self.start}"


@runtime_checkable  # annotations are checked in tests
class BatchSource(Protocol):
    """What the training loop reads: batches that are trees of NumPy arrays, rows on their first axis."""

    @property
    def shapes(self) -> Any:
        """The shape of each array of a training batch, in the batch's structure."""
        ...

    def batch(self, step: int, rows: slice = slice(None)) -> Any:
        """The batch of a step (0 = the first), or some rows of it."""
        ...

    def windows_of(self, step: int) -> list[str]:
        """Where each row of a step's batch comes from, for its reader."""
        ...

    def validation(self, batches: int) -> Iterator[Any]:
        """Up to so many held-out batches, the same ones every time; the last may have fewer rows."""
        ...


class Batches:
    """Batches of a mixture for a recipe: windows of T + 1 tokens, T apart, each used once per epoch of its source.

    No window spans two files. The last `validation_fraction` of each file is held out, and at least one window of each
    source.
    """

    def __init__(self, data: Mixture, recipe: Recipe):
        self.recipe, self.data = recipe, data
        self._interleaver = Interleaver(data.shares)
        self._sources = [_Source(source, recipe) for source in data.sources]
        self.windows = sum(source.train.count for source in self._sources)
        self.validation_windows = sum(source.held_out.count for source in self._sources)

    @property
    def shapes(self) -> tuple[int, int]:
        """The shape of a training batch."""
        return self.recipe.batch_size, self.recipe.sequence_length + 1

    def batch(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """The tokens `[B, T + 1]`, int32, of a step (0 = the first), or of some of its rows.

        Inputs are all but the last of each row, targets all but the first.
        """
        return self._read(self._windows(step, rows))

    def windows_of(self, step: int) -> list[str]:
        """The windows of a step's batch, as FOLDER:TOKEN."""
        return [str(window) for window in self._windows(step, slice(None))]

    def validation(self, batches: int) -> Iterator[np.ndarray]:
        """Up to `batches` batches of held-out windows, evenly spaced, the same ones every time.

        Each source gets its share of them, or fewer if it has fewer held-out windows.
        """
        B = self.recipe.batch_size
        source_ids, _ = self._interleaver(np.arange(batches * B))
        windows = []
        for source_id, source in enumerate(self._sources):
            count = min(int((source_ids == source_id).sum()), source.held_out.count)
            indices = np.linspace(0, source.held_out.count - 1, count).round().astype(int)
            windows += [Window(*source.held_out[index]) for index in indices]
        for start in range(0, len(windows), B):
            yield self._read(windows[start : start + B])

    def _windows(self, step: int, rows: slice) -> list[Window]:
        """A step's windows: a pure function of (seed, step, row)."""
        B = self.recipe.batch_size
        row_ids = np.arange(step * B, (step + 1) * B)[rows]
        source_ids, indices = self._interleaver(row_ids)
        windows: list[Window | None] = [None] * len(row_ids)
        for source_id, source in enumerate(self._sources):
            epochs, indices_in_epoch = np.divmod(indices, source.train.count)
            for epoch in np.unique(epochs[source_ids == source_id]):
                (selected,) = np.nonzero((source_ids == source_id) & (epochs == epoch))
                key = (self.recipe.seed, int(epoch), source_id)
                permuted = permute(indices_in_epoch[selected], source.train.count, key)
                for row, index in zip(selected, permuted, strict=True):
                    windows[row] = Window(*source.train[index])
        return [window for window in windows if window is not None]

    def _read(self, windows: list[Window]) -> np.ndarray:
        T, vocab_size = self.recipe.sequence_length, self.data.vocab_size
        out = np.empty((len(windows), T + 1), np.int32)
        for row, window in zip(out, windows, strict=True):
            row[:] = window.file.tokens[window.start : window.start + T + 1]
            if row.max() >= vocab_size:
                window.file.raise_out_of_vocabulary(window.start + int(np.argmax(row >= vocab_size)), vocab_size)
        return out


class _WindowIndex:
    """The windows of token ranges, each a file and the indices `start` and `stop` of its tokens."""

    def __init__(self, ranges: list[tuple[TokenFile, int, int]], T: int):
        self._ranges, self._T = ranges, T
        self._ends = np.cumsum([max(stop - start - 1, 0) // T for _, start, stop in ranges])
        self.count = int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[TokenFile, int]:
        """The file of a window and the index of its first token there."""
        i = int(np.searchsorted(self._ends, index, side="right"))
        file, start, _ = self._ranges[i]
        return file, start + int(index - (self._ends[i - 1] if i else 0)) * self._T


class _Source:
    """One source of a mixture: its training windows and its held-out windows."""

    def __init__(self, sets: Sequence[TokenSet], recipe: Recipe):
        T, files = recipe.sequence_length, [file for token_set in sets for file in token_set.files]
        held_out = [round(len(file.tokens) * recipe.validation_fraction) for file in files]
        if max(held_out) < T + 1:
            largest = max(range(len(files)), key=lambda i: len(files[i].tokens))
            held_out[largest] = T + 1
        starts = [max(len(file.tokens) - held, 0) for file, held in zip(files, held_out, strict=True)]
        self.train = _WindowIndex([(file, 0, start) for file, start in zip(files, starts, strict=True)], T)
        held_out_ranges = [(file, start, len(file.tokens)) for file, start in zip(files, starts, strict=True)]
        self.held_out = _WindowIndex(held_out_ranges, T)
        if not self.train.count or not self.held_out.count:
            tokens = sum(token_set.tokens for token_set in sets)
            raise InputFileError(
                f"{sets[0].path}: {tokens} tokens are too few for one training and one held-out sequence of {T} "
                "tokens: shorten --sequence-length or give more text"
            )
