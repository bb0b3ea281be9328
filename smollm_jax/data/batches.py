"""Prepared data to batches. Imports no framework.

A batch is a pure function of (recipe, data, step), and of the rows of it that are asked for: there is no reader state
to save or to lose, and each of several processes reads its own rows alone.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from smollm_jax.config import Recipe
from smollm_jax.data.mixture import Mixture, Turns
from smollm_jax.data.shuffle import shuffled
from smollm_jax.data.token_file import TokenFile, TokenSet
from smollm_jax.errors import InputFileError


@dataclasses.dataclass(frozen=True)
class Window:
    """Where T + 1 tokens lie: which of the mixture's sources, which token file, and the first token's place in it."""

    source: int
    file: TokenFile
    start: int

    def __str__(self) -> str:
        return f"{self.file.path.parent}:{self.start}"


class Batches:
    """Batches of a mixture under a recipe: windows of T + 1 tokens, T apart, each seen once an epoch of its source.

    No window spans two files. The last `validation_fraction` of each file is held out, at least one window of a source.
    """

    def __init__(self, data: Mixture, recipe: Recipe):
        self.recipe, self.data = recipe, data
        self._turns = Turns(data.shares)
        self._sources = [_Source(source, recipe) for source in data.sources]
        self.windows = sum(source.train.count for source in self._sources)
        self.validation_windows = sum(source.held_out.count for source in self._sources)

    def batch(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """The tokens `[B, T + 1]`, int32, of a step (0 = the first), or some rows of them.

        Inputs are all but the last of each row, targets all but the first.
        """
        return self._read(self._windows(step, rows))

    def windows_of(self, step: int) -> list[str]:
        """Which windows a step's batch is made of, as FOLDER:TOKEN."""
        return [str(window) for window in self._windows(step, slice(None))]

    def validation(self, batches: int) -> Iterator[np.ndarray]:
        """Up to `batches` batches of held-out tokens, evenly spread over them, the same ones every time.

        Of each source its share, or all it holds out.
        """
        B = self.recipe.batch_size
        turns, _ = self._turns(np.arange(batches * B))
        windows = []
        for number, source in enumerate(self._sources):
            count = min(int((turns == number).sum()), source.held_out.count)
            places = np.linspace(0, source.held_out.count - 1, count).round().astype(int)
            windows += [Window(number, *source.held_out[place]) for place in places]
        for start in range(0, len(windows), B):
            yield self._read(windows[start : start + B])

    def _windows(self, step: int, rows: slice) -> list[Window]:
        """A step's windows: a pure function of (seed, step, row)."""
        B = self.recipe.batch_size
        numbers = np.arange(step * B, (step + 1) * B)[rows]
        turns, places = self._turns(numbers)
        found: list[Window | None] = [None] * len(numbers)
        for number, source in enumerate(self._sources):
            epochs, places_in = np.divmod(places, source.train.count)
            for epoch in np.unique(epochs[turns == number]):
                (here,) = np.nonzero((turns == number) & (epochs == epoch))
                key = (self.recipe.seed, int(epoch), number)
                for row, index in zip(here, shuffled(places_in[here], source.train.count, key), strict=True):
                    found[row] = Window(number, *source.train[index])
        return [window for window in found if window is not None]

    def _read(self, windows: list[Window]) -> np.ndarray:
        T, limit = self.recipe.sequence_length, self.data.vocab_size
        out = np.empty((len(windows), T + 1), np.int32)
        for row, window in zip(out, windows, strict=True):
            row[:] = window.file.tokens[window.start : window.start + T + 1]
            if row.max() >= limit:
                window.file.refuse(window.start + int(np.argmax(row >= limit)), limit)
        return out


class _Spans:
    """The windows of parts of several files: of each the tokens from `start` to `stop`."""

    def __init__(self, parts: list[tuple[TokenFile, int, int]], T: int):
        self._parts, self._T = parts, T
        self._ends = np.cumsum([max(stop - start - 1, 0) // T for _, start, stop in parts])
        self.count = int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[TokenFile, int]:
        """The file of a window and its first token's place there."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        file, start, _ = self._parts[part]
        return file, start + int(index - (self._ends[part - 1] if part else 0)) * self._T


class _Source:
    """One source of a mixture, in its windows to train on and those that are held out."""

    def __init__(self, sets: Sequence[TokenSet], recipe: Recipe):
        T, files = recipe.sequence_length, [file for one in sets for file in one.files]
        held_out = [round(len(file.tokens) * recipe.validation_fraction) for file in files]
        if max(held_out) < T + 1:
            largest = max(range(len(files)), key=lambda i: len(files[i].tokens))
            held_out[largest] = T + 1
        starts = [max(len(file.tokens) - held, 0) for file, held in zip(files, held_out, strict=True)]
        self.train = _Spans([(file, 0, start) for file, start in zip(files, starts, strict=True)], T)
        rest = [(file, start, len(file.tokens)) for file, start in zip(files, starts, strict=True)]
        self.held_out = _Spans(rest, T)
        if not self.train.count or not self.held_out.count:
            raise InputFileError(
                f"{sets[0].path}: {sum(one.tokens for one in sets)} tokens are too few for one training and one "
                f"held-out sequence of {T}: shorten --sequence-length or give more text"
            )
