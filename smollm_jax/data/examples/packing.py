"""Examples in rows of one length: several a row by best fit, or each padded. Imports no framework."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from smollm_jax.data.examples.examples import Example, Pair

MAP_BATCH = 1000  # examples that are packed together, as by `datasets.map`, which TRL packs with


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of tokens `[R, T]`, int32, each with its target: the token that follows it, -1 where none is learnt.

    `documents` numbers the examples within a row from 0; padding is document -1, its tokens are 0. The last token of an
    example has no target, and neither has one whose next token is not learnt.
    """

    tokens: np.ndarray
    targets: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | np.ndarray) -> "Rows":
        return dataclasses.replace(self, **{name: array[rows] for name, array in self.arrays().items()})

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name: a batch."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class PairRows(Rows):
    """Rows of two answers to one prompt, the chosen one first: `[R, 2, T]` each.

    `reference` `[R, 2]`, float32: each answer's log-probability under the model that a DPO run starts from, NaN until
    it is computed.
    """

    reference: np.ndarray


RowsT = TypeVar("RowsT", bound=Rows)


def packed(examples: Sequence[Example], length: int) -> Rows:
    """Examples of up to `length` tokens, packed by best fit decreasing within each 1,000 of them.

    Source: trl 1.16, data_utils.py, `_pack_bfd`.
    """
    rows = []
    for start in range(0, len(examples), MAP_BATCH):
        batch = examples[start : start + MAP_BATCH]
        rows += [[batch[i] for i in numbers] for numbers in best_fit([len(example.ids) for example in batch], length)]
    return _filled(rows, length)


def padded(examples: Sequence[Example], length: int) -> Rows:
    """One example a row."""
    return _filled([[example] for example in examples], length)


def joined(parts: Sequence[RowsT]) -> RowsT:
    """The rows of all parts, in order."""
    if len(parts) == 1:
        return parts[0]
    arrays = [part.arrays() for part in parts]
    together = {name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]}
    return dataclasses.replace(parts[0], **together)


def paired(pairs: Sequence[Pair], length: int) -> PairRows:
    """One pair a row."""
    rows = padded([answer for pair in pairs for answer in (pair.chosen, pair.rejected)], length)
    arrays = {name: array.reshape(len(pairs), 2, length) for name, array in rows.arrays().items()}
    return PairRows(**arrays, reference=np.full((len(pairs), 2), np.nan, np.float32))


def pair_length(pairs: Sequence[Pair]) -> int:
    """The length of rows that hold every answer, a multiple of 128: cuDNN's attention within examples needs it."""
    longest = max(len(answer.ids) for pair in pairs for answer in (pair.chosen, pair.rejected))
    return -(-longest // 128) * 128


def best_fit(lengths: Sequence[int], space: int) -> list[list[int]]:
    """Numbers of the examples in each row: the longest first, each into the row with the least space that suffices.

    Of rows with equal space the one that has had it longest is filled; of equal lengths the first comes first.
    """
    rows: list[list[int]] = []
    with_space: dict[int, collections.deque[int]] = collections.defaultdict(collections.deque)
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [left for left, numbers in with_space.items() if numbers and left >= lengths[number]]
        left = min(fitting, default=space)
        if fitting:
            row = with_space[left].popleft()
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(number)
        with_space[left - lengths[number]].append(row)
    return rows


def _filled(rows: list[list[Example]], length: int) -> Rows:
    tokens = np.zeros((len(rows), length), np.int32)
    targets, documents = np.full_like(tokens, -1), np.full_like(tokens, -1)
    for row, examples in enumerate(rows):
        start = 0
        for number, example in enumerate(examples):
            stop = start + len(example.ids)
            tokens[row, start:stop] = example.ids
            targets[row, start : stop - 1] = np.where(example.learnt, example.ids, -1)[1:]
            documents[row, start:stop] = number
            start = stop
    return Rows(tokens, targets, documents)
