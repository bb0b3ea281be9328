"""Orders that are computed instead of stored: a shuffle of any size, and whose turn it is in a mixture. NumPy only."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from smollm_jax.errors import UsageError

ROUNDS = 12  # with 8, sizes below 4 come out uneven
LONGEST_PERIOD = 1_000_000


def shuffled(places: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """What stands at these places of `range(size)` shuffled by a key: each number once, and no array of `size`.

    A Feistel network on pairs of numbers below the root of `size`, walked until it lands below `size`.
    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002, sections 4 and 5.
    """
    side = np.uint64(math.isqrt(size - 1) + 1)
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    out = places.astype(np.uint64)
    walking = np.ones(out.shape, bool)
    while walking.any():
        left, right = np.divmod(out[walking], side)
        for round_key in keys:
            left, right = right, (left + _mixed(right ^ round_key) % side) % side
        out[walking] = left * side + right
        walking = out >= size
    return out.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014, mix64variant13."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Turns:
    """Which source each window of a mixture comes from, and which of that source's windows it is.

    Exact over every `period` windows, and within one window of the shares after any number of them.
    """

    def __init__(self, shares: Sequence[Fraction]):
        self.period = math.lcm(*(share.denominator for share in shares))
        if self.period > LONGEST_PERIOD:
            raise UsageError(f"the weights come out even after {self.period:,} windows only, at most 1,000,000: round")
        self.counts = np.array([int(share * self.period) for share in shares])
        self._table = np.array(_fair(self.counts.tolist()), np.int32)
        self._rank = np.empty(self.period, np.int64)
        for source, count in enumerate(self.counts):
            self._rank[self._table == source] = np.arange(count)

    def __call__(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sources of these windows of the mixture, and the numbers of the windows there."""
        period, place = np.divmod(windows, self.period)
        sources = self._table[place]
        return sources, period * self.counts[sources] + self._rank[place]


def _fair(counts: list[int]) -> list[int]:
    """A turn for each of `sum(counts)` places: after n, source i had n * counts[i] / sum(counts) turns, give or take 1.

    Source: Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980: of the sources that are not too
    early, the one whose deadline is first.
    """
    if len(counts) == 1:
        return [0] * counts[0]
    period, twice = sum(counts), 2 * len(counts) - 2
    whole = math.lcm(*counts)
    paces = [twice * (whole // count) for count in counts]
    deadlines = [pace - pace // twice for pace in paces]
    given, turns = [0] * len(counts), []
    for place in range(1, period + 1):
        ready = (i for i, n in enumerate(given) if twice * (counts[i] * place - period * n) >= period)
        chosen = min(ready, key=deadlines.__getitem__)
        given[chosen] += 1
        deadlines[chosen] += paces[chosen]
        turns.append(chosen)
    return turns
