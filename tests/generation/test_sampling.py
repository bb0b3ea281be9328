"""Samples follow the filtered distribution, row by row, and invalid parameters are errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.errors import UsageError
from smollm_jax.generation.sampling import BatchedSampling, Sampling, apply_repetition_penalty, filter_mask, sample

LOGITS = np.array([2.0, 1.0, 1.5, -1.0, 0.5, 0.0, -3.0, 1.2, 1.9, -0.2])
SEEN = np.array([1, 0, 1, 1, 0, 0, 0, 0, 1, 0], bool)
DRAWS = 100_000
SETTINGS = [
    Sampling(temperature, top_k, top_p, min_p, penalty, seed=7)
    for temperature, (top_k, top_p, min_p), penalty in itertools.chain(
        itertools.product([0.7, 1.5], [(0, 1.0, 0.0), (4, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.2)], [1.0]),
        itertools.product([1.0], [(6, 0.6, 0.0), (6, 1.0, 0.3), (0, 0.9, 0.15), (7, 0.9, 0.1)], [1.0, 1.4]),
        itertools.product([1.0], [(0, 1.0, 0.0)], [0.5, 1.4]),
    )
]


def reference(logits: np.ndarray, seen: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution to sample from, in float64: sort, filter, normalize."""
    logits = logits.astype(np.float64)
    penalty = sampling.repetition_penalty
    logits = np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)
    p = np.exp((logits - logits.max()) / sampling.temperature)
    p /= p.sum()
    if sampling.top_k and sampling.top_k < len(p):
        p[p < np.sort(p)[-sampling.top_k]] = 0
        p /= p.sum()
    order = np.argsort(-p)
    if sampling.top_p < 1:
        p[order[int(np.searchsorted(np.cumsum(p[order]), sampling.top_p)) + 1 :]] = 0
        p /= p.sum()
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


def repeated(sampling: Sampling, rows: int) -> BatchedSampling:
    return jax.tree.map(lambda x: jnp.repeat(x, rows), BatchedSampling.stack([sampling]))


def chi_square(draws: np.ndarray, p: np.ndarray) -> float:
    counts = np.bincount(draws, minlength=len(p))
    assert set(np.flatnonzero(counts)) == set(np.flatnonzero(p)), "another set of tokens was drawn from"
    expected = len(draws) * p[p > 0]
    return float(((counts[p > 0] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_draws_follow_the_reference_distribution(sampling):
    """With one seed, over the token counts of a text."""
    logits, seen = (jnp.asarray(np.tile(x, (DRAWS, 1))) for x in (LOGITS.astype(np.float32), SEEN))
    draws = sample(logits, repeated(sampling, DRAWS), jnp.arange(DRAWS), seen)
    # At most 9 degrees of freedom: p < 1e-4 beyond 34.
    assert chi_square(np.asarray(draws), reference(LOGITS, SEEN, sampling)) < 34


def test_draws_of_many_seeds_follow_the_distribution_too():
    sampling = repeated(Sampling(temperature=1.0), DRAWS)
    sampling = BatchedSampling(**{**vars(sampling), "seed": jnp.arange(DRAWS, dtype=jnp.uint32) * 42_949})
    logits = jnp.asarray(np.tile(LOGITS.astype(np.float32), (DRAWS, 1)))
    draws = sample(logits, sampling, jnp.zeros(DRAWS, jnp.int32), jnp.zeros(logits.shape, bool))
    assert chi_square(np.asarray(draws), reference(LOGITS, 0 * SEEN, Sampling(temperature=1.0))) < 34


def test_every_row_is_drawn_as_if_it_were_alone():
    rng = np.random.default_rng(0)
    rows = [*SETTINGS, Sampling(), Sampling(repetition_penalty=3.0, seed=5)]
    logits = jnp.asarray(rng.normal(size=(len(rows), 500)).astype(np.float32) * 4)
    seen = jnp.asarray(rng.random(logits.shape) < 0.1)
    count = jnp.asarray(rng.integers(0, 9, len(rows)))
    together = sample(logits, BatchedSampling.stack(rows), count, seen)
    for i, row in enumerate(rows):
        alone = sample(logits[i : i + 1], BatchedSampling.stack([row]), count[i : i + 1], seen[i : i + 1])
        assert int(alone[0]) == int(together[i]), row
    assert int(together[-2]) == int(logits[-2].argmax())


@pytest.mark.parametrize("spread", [3.0, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.1, 30.0))])
def test_the_tokens_kept_of_a_real_vocabulary_are_the_references(spread):
    rng = np.random.default_rng(1)
    logits = (rng.normal(size=49_152) * spread).astype(np.float32)
    for top_k, top_p, min_p in itertools.product([0, 1, 50, 49_152, 10**12], [1.0, 0.95, 1e-9], [0.0, 0.01]):
        sampling = Sampling(1.0, top_k, top_p, min_p)
        ours = np.asarray(filter_mask(jnp.asarray(logits - logits.max())[None], BatchedSampling.stack([sampling])))[0]
        p = reference(logits, np.zeros(logits.shape, bool), sampling)
        # A float32 sum over the vocabulary may cross top_p some tokens earlier or later.
        assert p[ours != (p > 0)].sum() + (ours != (p > 0)).sum() * p[p > 0].min() < 1e-5, sampling
        if top_p == 1:
            np.testing.assert_array_equal(ours, p > 0)


def test_equal_tokens_are_kept_or_cut_together():
    scaled = jnp.asarray([[0.0, -1.0, -1.0, -1.0, -2.0, -np.inf]])
    for sampling, count in ((Sampling(1, top_k=2), 4), (Sampling(1, top_p=0.6), 4), (Sampling(1, top_k=1), 1)):
        assert int(filter_mask(scaled, BatchedSampling.stack([sampling])).sum()) == count


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 5e-324])
def test_a_temperature_near_0_is_greedy(temperature):
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(64, 1000)).astype(np.float32) * 10)
    count = jnp.arange(64)
    draws = sample(logits, repeated(Sampling(temperature=temperature), 64), count, jnp.zeros(logits.shape, bool))
    np.testing.assert_array_equal(draws, logits.argmax(axis=-1))


def test_the_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits = jnp.asarray([[2.0, -2.0, 3.0, -3.0]])
    seen = jnp.asarray([[True, True, False, False]])
    np.testing.assert_array_equal(apply_repetition_penalty(logits, seen, jnp.asarray([4.0])), [[0.5, -8.0, 3.0, -3.0]])


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "1"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
        {"min_p": 1.0},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": float("inf")},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": None},
    ],
    ids=str,
)
def test_sampling_that_makes_no_sense_is_refused_by_name(change):
    with pytest.raises(UsageError, match=f"^{next(iter(change))} must be") as caught:
        Sampling(**change)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
