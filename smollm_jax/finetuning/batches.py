"""Rows of examples as batches: a pure function of (recipe, rows, step). Imports no framework."""

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from smollm_jax.config.finetune_recipe import FinetuneRecipe
from smollm_jax.data.examples.examples import Example, Pair
from smollm_jax.data.examples.packing import Rows, joined, packed, padded, paired
from smollm_jax.data.mixture import Interleaver
from smollm_jax.data.shuffle import permute
from smollm_jax.errors import InputFileError

DROPOUT = 1 << 22  # sets the keys of dropout apart from those of the order of the rows


def split(examples: Sequence[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Examples (or pairs) to train on and those held out, which the seed draws; each in the order of the file."""
    count = min(max(round(len(examples) * fraction), 1), len(examples) - 1) if fraction and examples else 0
    held_out = set(permute(np.arange(count), max(len(examples), 1), (seed, 1 << 20)).tolist()) if count else set()
    parts: tuple[list[Any], list[Any]] = [], []
    for number, example in enumerate(examples):
        parts[number in held_out].append(example)
    return parts


class RowBatches:
    """Batches of rows, or of pairs of rows; each source's rows come in another order in each of its epochs.

    With several sources, each has its share of the rows of every stretch of batches, as in pre-training's mixture
    (`data.mixture.Interleaver`): all its rows come once before one comes again, and one that is used up starts over.
    An epoch of the run is as many rows as all sources have together.
    """

    def __init__(
        self, sources: Sequence[tuple[Rows, Rows]], recipe: FinetuneRecipe, shares: Sequence[Fraction] = (Fraction(1),)
    ):
        """`sources`: the rows that are trained on and those held out, of each source."""
        if not all(len(train) for train, _ in sources):
            raise InputFileError("the data holds no example with a token to learn")
        self.recipe, self.shares = recipe, shares
        self._counts = [(len(train), len(held_out)) for train, held_out in sources]
        self.train, self.held_out = (joined(rows) for rows in zip(*sources, strict=True))
        self._interleaver = Interleaver(shares)

    @classmethod
    def of(
        cls,
        sources: Sequence[tuple[Sequence[Example | Pair], Sequence[Example | Pair]]],
        recipe: FinetuneRecipe,
        shares: Sequence[Fraction] = (Fraction(1),),
    ) -> "RowBatches":
        """The batches of each source's examples, packed or padded as the recipe says, or of its pairs."""
        lay: Any = paired if recipe.method == "dpo" else packed if recipe.packing else padded
        rows = [(lay(train, recipe.sequence_length), lay(held, recipe.sequence_length)) for train, held in sources]
        return cls(rows, recipe, shares)

    def with_recipe(self, recipe: FinetuneRecipe) -> "RowBatches":
        """The same rows in the batches of another recipe, of the same seed."""
        changed = copy.copy(self)
        changed.recipe = recipe
        return changed

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of a training batch."""
        one_row = self.batch(0, slice(1))
        return {name: (self.recipe.batch_size, *array.shape[1:]) for name, array in one_row.items()}

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """The dtype of each array of a batch."""
        return {name: array.dtype for name, array in self.batch(0, slice(1)).items()}

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """The rows `[B, T]` of a step (0 = the first), or some of them; with dropout, also a key for each row's masks.

        "dropout_keys" are uint32 `[B, 2]`, of pairs `[B, 2, 2]`: a function of (seed, step, row).
        """
        return self.train[self._numbers(step, step + 1)[rows]].arrays() | self._dropout_keys(step, rows)

    def windows_of(self, step: int) -> list[str]:
        """The numbers of the rows of a step's batch."""
        return [f"row {number}" for number in self._numbers(step, step + 1)]

    def validation(self, batches: int) -> Iterator[dict[str, np.ndarray]]:
        """Up to `batches` batches of held-out rows, evenly spread over them, the same ones every time.

        Each source has its share of them, or fewer if it has fewer held-out rows.
        """
        size, numbers = self.recipe.batch_size, self.validation_numbers(batches)
        for start in range(0, len(numbers), size):
            yield self.held_out[numbers[start : start + size]].arrays()

    def validation_numbers(self, batches: int) -> np.ndarray:
        """The numbers of the held-out rows that `validation` takes."""
        sources, _ = self._interleaver(np.arange(batches * self.recipe.batch_size))
        numbers, first = [], 0
        for source, (_, rows) in enumerate(self._counts):
            count = min(int((sources == source).sum()), rows)
            numbers.append(first + np.linspace(0, rows - 1, count).round().astype(int))
            first += rows
        return np.concatenate(numbers)

    @property
    def sha256(self) -> str:
        """A hash of all rows, and of the shares of several sources: what identifies the data of a run."""
        digest = hashlib.sha256()
        for rows in (self.train, self.held_out):
            for array in (rows.tokens, rows.targets, rows.documents):
                digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        if len(self.shares) > 1:
            digest.update(f"{self._counts}{[str(share) for share in self.shares]}".encode())
        return digest.hexdigest()

    def _dropout_keys(self, step: int, rows: slice) -> dict[str, np.ndarray]:
        if not self.recipe.lora_dropout:
            return {}
        shape = (self.recipe.batch_size, *self.train.tokens.shape[1:-1], 2)
        keys = np.random.SeedSequence((self.recipe.seed, step, DROPOUT)).generate_state(math.prod(shape))
        return {"dropout_keys": keys.reshape(shape)[rows]}

    def met(self) -> np.ndarray:
        """The numbers of the rows that the run trains on, each once, in ascending order."""
        return np.unique(self._numbers(0, self.recipe.steps))

    def _numbers(self, step: int, stop: int) -> np.ndarray:
        """The numbers in `train` of the rows of the steps from `step` to before `stop`."""
        size = self.recipe.batch_size
        sources, indices = self._interleaver(np.arange(step * size, stop * size))
        numbers, first = np.empty(len(indices), np.int64), 0
        for source, (rows, _) in enumerate(self._counts):
            epochs, places = np.divmod(indices, rows)
            for epoch in np.unique(epochs[sources == source]):
                chosen = (sources == source) & (epochs == epoch)
                numbers[chosen] = first + permute(places[chosen], rows, (self.recipe.seed, int(epoch), source))
            first += rows
        return numbers
