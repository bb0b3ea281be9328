"""Rows of examples as batches: a pure function of (recipe, rows, step). Imports no framework."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from smollm_jax.config.finetune_recipe import FinetuneRecipe
from smollm_jax.data.examples.examples import Example
from smollm_jax.data.examples.packing import Rows, packed, padded
from smollm_jax.data.shuffle import permute
from smollm_jax.errors import InputFileError


def split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to train on and those held out, which the seed draws; each in the order of the file."""
    count = min(max(round(len(examples) * fraction), 1), len(examples) - 1) if fraction and examples else 0
    held_out = set(permute(np.arange(count), max(len(examples), 1), (seed, 1 << 20)).tolist()) if count else set()
    parts: tuple[list[Example], list[Example]] = [], []
    for number, example in enumerate(examples):
        parts[number in held_out].append(example)
    return parts


class RowBatches:
    """Batches of rows, in another order each epoch; every row once an epoch."""

    def __init__(self, train: Rows, held_out: Rows, recipe: FinetuneRecipe):
        if not len(train):
            raise InputFileError("the data holds no example with a token to learn")
        self.train, self.held_out, self.recipe = train, held_out, recipe

    @classmethod
    def of(cls, train: Sequence[Example], held_out: Sequence[Example], recipe: FinetuneRecipe) -> "RowBatches":
        """The batches of examples, packed or padded as the recipe says."""
        lay = packed if recipe.packing else padded
        return cls(lay(train, recipe.sequence_length), lay(held_out, recipe.sequence_length), recipe)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape of each array of a training batch."""
        return dict.fromkeys(("tokens", "targets", "documents"), (self.recipe.batch_size, self.recipe.sequence_length))

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """The rows `[B, T]` of a step (0 = the first), or some of them."""
        return _arrays(self.train[self._numbers(step)[rows]])

    def windows_of(self, step: int) -> list[str]:
        """The numbers of the rows of a step's batch."""
        return [f"row {number}" for number in self._numbers(step)]

    def validation(self, batches: int) -> Iterator[dict[str, np.ndarray]]:
        """Up to `batches` batches of held-out rows, evenly spread over them, the same ones every time."""
        size, count = self.recipe.batch_size, len(self.held_out)
        numbers = np.linspace(0, count - 1, min(batches * size, count)).round().astype(int)
        for start in range(0, len(numbers), size):
            yield _arrays(self.held_out[numbers[start : start + size]])

    @property
    def sha256(self) -> str:
        """A hash of all rows: what identifies the data of a run."""
        digest = hashlib.sha256()
        for rows in (self.train, self.held_out):
            for array in _arrays(rows).values():
                digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        return digest.hexdigest()

    def _numbers(self, step: int) -> np.ndarray:
        size, count = self.recipe.batch_size, len(self.train)
        epochs, places = np.divmod(np.arange(step * size, (step + 1) * size), count)
        seed = self.recipe.seed
        return np.concatenate([permute(places[epochs == n], count, (seed, int(n))) for n in np.unique(epochs)])


def _arrays(rows: Rows) -> dict[str, np.ndarray]:
    return {"tokens": rows.tokens, "targets": rows.targets, "documents": rows.documents}
