"""Whatever the lengths of files and sources: each token is learnt once an epoch, in an order of its own, from any step.

Of pre-training's windows (`data.batches`) and of fine-tuning's rows (`finetuning.batches`).
"""

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from smollm_jax.config import Recipe
from smollm_jax.config.finetune_recipe import FinetuneRecipe
from smollm_jax.data.batches import Batches
from smollm_jax.data.examples import packing
from smollm_jax.data.examples.examples import Example
from smollm_jax.data.examples.packing import Rows, packed, padded
from smollm_jax.data.mixture import Mixture
from smollm_jax.data.token_file import TokenFile, TokenSet
from smollm_jax.errors import InputFileError
from smollm_jax.finetuning.batches import RowBatches

RECIPE = Recipe(100, 3, 16, 1e-3, 0, "float32", validation_fraction=0.5)
ROW_RECIPE = FinetuneRecipe(100, 3, 2, 1e-3, 0, "float32")
HALVES = (Fraction(1, 2), Fraction(1, 2))


def mixture(sources: list[list[int]], weights: list[int]) -> Mixture:
    """Sources of token files of these lengths; no two tokens have the same id."""
    sets, first = [], 0
    for lengths in sources:
        files = []
        for length in lengths:
            ids = np.arange(first, first + length, dtype=np.uint16)
            files.append(TokenFile(Path(f"{first}/tokens.bin"), ids, np.array([length]), str(first), "", 0, 0))
            first += length
        sets.append((TokenSet(Path("set"), tuple(files)),))
    return Mixture(tuple(sets), tuple(Fraction(weight, sum(weights)) for weight in weights))


def numbered_rows(count: int) -> Rows:
    """Rows whose only token is their number."""
    return padded([Example(np.array([i, i], np.int32), np.ones(2, bool)) for i in range(count)], 2)


def held_out_counts(lengths: list[int], fraction: float, T: int) -> list[int]:
    """Tokens held out of each file: a share, or where that has no window one of the largest file."""
    counts = [round(length * fraction) for length in lengths]
    if max(counts) <= T:
        counts[lengths.index(max(lengths))] = T + 1
    return counts


@given(
    st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=3), min_size=1, max_size=3),
    st.lists(st.integers(1, 3), min_size=3, max_size=3),
    st.integers(1, 9),
    st.integers(8, 64),
    st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    st.integers(0, 2**32),
)
def test_each_token_is_learnt_once_an_epoch_and_held_out_ones_never(sources, weights, T, B, fraction, seed):
    weights = weights[: len(sources)]
    data = mixture(sources, weights)
    changes: dict[str, Any] = {"batch_size": B, "sequence_length": T, "validation_fraction": fraction, "seed": seed}
    try:
        batches = Batches(data, dataclasses.replace(RECIPE, **changes))
    except InputFileError:  # a source is too short for two windows
        assume(False)
    held_out = {int(token) for batch in batches.validation(100) for token in batch.ravel()}
    steps = -(-2 * sum(weights) * batches.windows // B)
    rows = np.concatenate([batches.batch(step) for step in range(steps)])
    assert (np.diff(rows) == 1).all(), "a window leaves out a token, or spans two files"
    for lengths, (token_set,) in zip(sources, data.sources, strict=True):
        expected: list[int] = []
        kept: list[int] = []  # as input or target of a held-out window
        for file, length, held in zip(token_set.files, lengths, held_out_counts(lengths, fraction, T), strict=True):
            first, windows = int(file.tokens[0]), max(length - held - 1, 0) // T
            expected += range(first + 1, first + 1 + windows * T)  # the first token has none before it
            start = first + max(length - held, 0)
            windows = max(first + length - start - 1, 0) // T
            kept += range(start, start + windows * T + 1) if windows else ()
        assert held_out & {*np.concatenate([file.tokens for file in token_set.files]).tolist()} == {*kept}
        mine = rows[np.isin(rows[:, 1], expected)]
        count = len(expected) // T
        for epoch in (mine[:count], mine[count : 2 * count]):
            assert sorted(epoch[:, 1:].ravel()) == expected, "a token comes twice in an epoch, or not at all"


@given(st.integers(0, 40), st.integers(0, 3), st.integers(0, 7))
def test_a_run_that_is_resumed_at_any_step_reads_the_batches_it_would_have_read(start, seed, row):
    changes: dict[str, Any] = {"batch_size": 7, "seed": seed}
    make: list[Any] = [
        lambda: Batches(mixture([[300], [200, 100]], [2, 1]), dataclasses.replace(RECIPE, **changes)),
        lambda: RowBatches(
            [(numbered_rows(9), numbered_rows(1)), (numbered_rows(12), numbered_rows(1))],
            dataclasses.replace(ROW_RECIPE, **changes),
            HALVES,
        ),
    ]
    for new in make:
        straight, resumed = new(), new()
        before = [straight.windows_of(step) for step in range(start + 3)]
        assert [resumed.windows_of(step) for step in range(start, start + 3)] == before[start:]
        whole, rows = straight.batch(start), [resumed.batch(start, slice(*cut)) for cut in ((0, row), (row, 7))]
        for name in whole if isinstance(whole, dict) else [...]:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in rows]), whole[name])


def orders(names: list[str]) -> list[tuple[str, ...]]:
    """The windows "SOURCE:PLACE" of each of two sources, in order."""
    sources = sorted({name.partition(":")[0] for name in names})
    return [tuple(name for name in names if name.startswith(f"{source}:")) for source in sources]


def test_every_epoch_of_every_source_has_another_order_for_another_seed():
    """29 windows, or rows, of each of two sources, a batch an epoch."""
    made, parts = [], [(numbered_rows(29), numbered_rows(1))] * 2
    for seed in (0, 1):
        changes: dict[str, Any] = {"seed": seed, "batch_size": 58}
        rows = RowBatches(parts, dataclasses.replace(ROW_RECIPE, **changes), HALVES)
        windows = Batches(mixture([[960], [960]], [1, 1]), dataclasses.replace(RECIPE, **changes))
        for epoch in range(3):
            for order in orders(windows.windows_of(epoch)):
                made.append(("window", *(int(name.partition(":")[2]) // 16 for name in order)))
            numbers = [divmod(int(name.removeprefix("row ")), 29) for name in rows.windows_of(epoch)]
            for order in orders([f"{source}:{place}" for source, place in numbers]):
                made.append(("row", *(int(name.partition(":")[2]) for name in order)))
    assert all(sorted(order) == list(range(29)) for _, *order in made)
    assert len({*made}) == len(made) == 2 * 3 * 4, "two epochs, sources or seeds have the same order"


def test_validation_takes_windows_evenly_spread_and_its_last_batch_may_be_smaller():
    batches = Batches(mixture([[1000]], [1]), RECIPE)  # 500 tokens held out: 31 windows
    assert batches.validation_windows == 31
    firsts = [[batch[:, 0].tolist() for batch in batches.validation(count)] for count in (2, 99)]
    assert [len(batch) for batch in firsts[1]] == [3] * 10 + [1]
    assert [first for batch in firsts[1] for first in batch] == list(range(500, 981, 16))
    assert firsts[0] == [[500, 596, 692], [788, 884, 980]]
    rows = RowBatches([(numbered_rows(2), numbered_rows(31))], ROW_RECIPE)
    numbers = [[batch["tokens"][:, 0].tolist() for batch in rows.validation(count)] for count in (2, 99)]
    assert numbers[0] == [[0, 6, 12], [18, 24, 30]]
    assert [len(batch) for batch in numbers[1]] == [3] * 10 + [1]
    assert [number for batch in numbers[1] for number in batch] == list(range(31))


@given(st.lists(st.integers(2, 12), min_size=1, max_size=40), st.integers(0, 2**32))
def test_packed_and_padded_rows_have_each_token_once_and_each_but_an_examples_first_as_a_target(lengths, seed):
    """Where it is learnt; and every example lies in one row, its tokens in order, under one number of document."""
    rng, first, examples = np.random.default_rng(seed), 0, []
    for length in lengths:
        examples.append(Example(np.arange(first, first + length, dtype=np.int32), rng.random(length) < 0.7))
        first += length
    learnt = [int(i) for example in examples for i in example.ids[1:][example.learnt[1:]]]
    for rows in (packed(examples, 12), padded(examples, 12)):
        assert sorted(rows.targets[rows.targets >= 0]) == learnt
        assert sorted(rows.tokens[rows.documents >= 0]) == list(range(first))
        assert (rows.targets[rows.targets >= 0] == rows.tokens[rows.targets >= 0] + 1).all()
        assert not rows.tokens[rows.documents < 0].any()
        spans = [
            (int(row[document == number][0]), int((document == number).sum()))
            for row, document in zip(rows.tokens, rows.documents, strict=True)
            for number in range(document.max() + 1)
        ]
        assert sorted(spans) == [(int(example.ids[0]), len(example.ids)) for example in examples]
    assert len(packed(examples, 12)) <= len(padded(examples, 12)) == len(lengths)


def test_examples_beyond_the_first_batch_of_a_thousand_are_packed_too(monkeypatch):
    monkeypatch.setattr(packing, "MAP_BATCH", 4)
    examples = [Example(np.array([i, i], np.int32), np.ones(2, bool)) for i in range(10)]
    rows = packed(examples, 6)
    assert sorted(rows.tokens[rows.documents >= 0][::2]) == list(range(10))
    assert len(rows) == 2 + 2 + 1, "examples of two batches share a row"
