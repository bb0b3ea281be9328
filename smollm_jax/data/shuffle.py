"""A shuffle of any size that is computed instead of stored. NumPy only."""

import math
from collections.abc import Sequence

import numpy as np

ROUNDS = 12  # with 8, sizes below 4 come out uneven


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
