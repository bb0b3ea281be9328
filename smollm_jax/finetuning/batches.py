"""Rows of examples as batches: a pure function of (recipe, rows, step). Imports no framework."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from smollm_jax.config.finetune_recipe import FinetuneRecipe
from smollm_jax.data.examples.examples import Example, Pair
from smollm_jax.data.examples.packing import Rows, packed, padded, paired
from smollm_jax.data.shuffle import permute
from smollm_jax.errors import InputFileError


def split(examples: Sequence[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Examples (or pairs) to train on and those held out, which the seed draws; each in the order of the file."""
    count = min(max(round(len(examples) * fraction), 1), len(examples) - 1) if fraction and examples else 0
    held_out = set(permute(np.arange(count), max(len(examples), 1), (seed, 1 << 20)).tolist()) if count else set()
    parts: tuple[list[Any], list[Any]] = [], []
    for number, example in enumerate(examples):
        parts[number in held_out].append(example)
    return parts


class RowBatches:
    """Batches of rows, or of pairs of rows, in another order each epoch; every row once an epoch."""

    def __init__(self, train: Rows, held_out: Rows, recipe: FinetuneRecipe):
        if not len(train):
            raise InputFileError("the data holds no example with a token to learn")
        self.train, self.held_out, self.recipe = train, held_out, recipe

    @classmethod
    def of(
        cls, train: Sequence[Example | Pair], held_out: Sequence[Example | Pair], recipe: FinetuneRecipe
    ) -> "RowBatches":
        """The batches of examples, packed or padded as the recipe says, or of pairs."""
        lay: Any = paired if recipe.method == "dpo" else packed if recipe.packing else padded
        return cls(lay(train, recipe.sequence_length), lay(held_out, recipe.sequence_length), recipe)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of a training batch."""
        size = self.recipe.batch_size
        return {name: (size, *array.shape[1:]) for name, array in self.train.arrays().items()}

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """The dtype of each array of a batch."""
        return {name: array.dtype for name, array in self.train.arrays().items()}

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """The rows `[B, T]` of a step (0 = the first), or some of them."""
        return self.train[self.numbers(step)[rows]].arrays()

    def windows_of(self, step: int) -> list[str]:
        """The numbers of the rows of a step's batch."""
        return [f"row {number}" for number in self.numbers(step)]

    def validation(self, batches: int) -> Iterator[dict[str, np.ndarray]]:
        """Up to `batches` batches of held-out rows, evenly spread over them, the same ones every time."""
        size, numbers = self.recipe.batch_size, self.validation_numbers(batches)
        for start in range(0, len(numbers), size):
            yield self.held_out[numbers[start : start + size]].arrays()

    def validation_numbers(self, batches: int) -> np.ndarray:
        """The numbers of the held-out rows that `validation` takes."""
        count = len(self.held_out)
        return np.linspace(0, count - 1, min(batches * self.recipe.batch_size, count)).round().astype(int)

    @property
    def sha256(self) -> str:
        """A hash of all rows: what identifies the data of a run."""
        digest = hashlib.sha256()
        for rows in (self.train, self.held_out):
            for array in (rows.tokens, rows.targets, rows.documents):
                digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        return digest.hexdigest()

    def numbers(self, step: int) -> np.ndarray:
        """The numbers of a step's rows."""
        size, count = self.recipe.batch_size, len(self.train)
        epochs, places = np.divmod(np.arange(step * size, (step + 1) * size), count)
        seed = self.recipe.seed
        return np.concatenate([permute(places[epochs == n], count, (seed, int(n))) for n in np.unique(epochs)])
