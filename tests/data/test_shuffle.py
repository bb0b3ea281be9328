"""Computed orders: a shuffle is a bijection at any size, and a mixture keeps its weights at every point of a run."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smollm_jax.data import mixture
from smollm_jax.data.mixture import Interleaver
from smollm_jax.data.shuffle import permute
from smollm_jax.errors import UsageError

PINNED = [5, 0, 1, 8, 6, 4, 3, 9, 2, 7]  # of seed 0, in the first epoch of the first source
SIZES = [*range(1, 18), 97, 100, 1009, 4096, 65537]


@pytest.mark.parametrize("size", SIZES)
def test_a_shuffle_has_every_number_once(size):
    for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (2**40, 7, 3)):
        assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 7, 60])
def test_every_number_comes_everywhere_about_equally_often(size):
    keys = 3000
    permutations = np.stack([permute(np.arange(size), size, (seed, 0, 0)) for seed in range(keys)])
    counts = np.stack([np.bincount(column, minlength=size) for column in permutations.T])
    expected = keys / size
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = (size - 1) ** 2
    assert chi_square < freedom + 6 * math.sqrt(2 * freedom), "some numbers have their places"


@pytest.mark.parametrize(("size", "keys"), [(3, 6000), (4, 3000)])
def test_every_order_of_few_numbers_comes_about_equally_often(size, keys):
    """Fewer rounds reach every order, too, but some far more often."""
    counts = Counter(tuple(permute(np.arange(size), size, (seed, 0, 0))) for seed in range(keys))
    orders = math.factorial(size)
    assert len(counts) == orders
    expected, freedom = keys / orders, orders - 1
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < freedom + 6 * math.sqrt(2 * freedom)


def reference(index: int, size: int, key: tuple[int, ...]) -> int:
    """`permute` of one index, in Python's own integers."""
    side, keys = math.isqrt(size - 1) + 1, np.random.SeedSequence(key).generate_state(12, np.uint64)
    while True:
        left, right = divmod(index, side)
        for round_key in keys:
            x = right ^ int(round_key)
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
            left, right = right, (left + (x ^ (x >> 31)) % side) % side
        index = left * side + right
        if index < size:
            return index


@pytest.mark.parametrize("size", [1, 2, 10, 97, 65537, 10**9])
def test_the_order_is_feistel_1_as_data_prepared_and_runs_begun_earlier_have_it(size):
    places = np.unique(np.linspace(0, size - 1, 9).astype(int))
    for key in ((0, 0, 0), (7, 1, 2), (2**40, 0, 0)):
        assert permute(places, size, key).tolist() == [reference(int(place), size, key) for place in places]
    assert permute(np.arange(10), 10, (0, 0, 0)).tolist() == PINNED


def test_neighbours_are_torn_apart_and_keys_have_nothing_in_common():
    size = 100_000
    first, second = (permute(np.arange(size), size, (0, epoch, 0)) for epoch in (0, 1))
    for sequence in (first, first - second, np.diff(first)):
        # Of two independent even numbers below `size`, or of their difference: correlation 0 give or take 1/sqrt(size).
        assert abs(np.corrcoef(sequence[:-1], sequence[1:])[0, 1] - (-0.5 if len(sequence) < size else 0)) < 0.02
    assert (np.diff(first) == 1).sum() < 10
    assert (first == second).sum() < 10


def test_a_billion_windows_take_no_memory_and_a_part_is_what_the_whole_says():
    places = np.array([0, 10**9 - 1, 5])
    permuted = permute(places, 10**9, (3, 4, 5))
    assert ((permuted >= 0) & (permuted < 10**9)).all()
    assert permute(places[2:], 10**9, (3, 4, 5)) == permuted[2]
    assert permute(np.array([2**61]), 2**62, (0,))[0] < 2**62
    small = permute(np.arange(1009), 1009, (3, 4, 5))
    np.testing.assert_array_equal(permute(np.arange(1009)[::7], 1009, (3, 4, 5)), small[::7])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
@example([9, 10, 3])
@example([1, 1, 1, 11])
def test_a_mixture_is_within_one_window_of_its_shares_at_any_point_and_exact_over_periods(weights):
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    turns = Interleaver(shares)
    numbers = np.arange(2 * turns.period)
    sources, places = turns(numbers)
    for source, share in enumerate(shares):
        had = np.cumsum(sources == source)
        # Tijdeman's theorem; for one source no difference at all.
        most = 1 - 1 / (2 * len(shares) - 2) if len(shares) > 1 else 0
        assert np.abs(had - (numbers + 1) * float(share)).max() < most + 1e-9
        assert had[turns.period - 1] == share * turns.period
        np.testing.assert_array_equal(places[sources == source], np.arange(had[-1]))  # none left out, none twice


def test_weights_that_never_come_out_even_are_refused(monkeypatch):
    message = (
        "--data: these weights repeat only every 3,000,000 windows, at most 1,000,000 are allowed: round the weights"
    )
    with pytest.raises(UsageError, match=f"^{message}$"):
        Interleaver([Fraction(1, 3_000_000), Fraction(2_999_999, 3_000_000)])
    assert Interleaver([Fraction(1)]).period == 1
    monkeypatch.setattr(mixture, "MAX_PERIOD", 10)
    sources, places = Interleaver([Fraction(3, 10), Fraction(7, 10)])(np.arange(20))
    assert (sources.dtype.kind, places.dtype.kind) == ("i", "i")
    with pytest.raises(UsageError, match="repeat only every 11 windows"):
        Interleaver([Fraction(3, 11), Fraction(8, 11)])
