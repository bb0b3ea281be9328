"""A random permutation of any size, computed element by element in constant memory. NumPy only."""

import math
from collections.abc import Sequence

import numpy as np

ROUNDS = 12  # with 8, permutations of fewer than 4 elements are not uniform


def permute(indices: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """The elements at `indices` of the permutation of `range(size)` that `key` selects.

    A Feistel network permutes pairs of numbers below ceil(sqrt(size)); a result of `size` or more is permuted again
    (cycle walking).
    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002, sections 4 and 5.
    """
    side = np.uint64(math.isqrt(size - 1) + 1)
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    out = indices.astype(np.uint64)
    pending = np.ones(out.shape, bool)
    while pending.any():
        left, right = np.divmod(out[pending], side)
        for round_key in keys:
            left, right = right, (left + _mix64(right ^ round_key) % side) % side
        out[pending] = left * side + right
        pending = out >= size
    return out.astype(np.int64)


def _mix64(x: np.ndarray) -> np.ndarray:
    """A hash of 64-bit integers.

    Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014, mix64variant13.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
