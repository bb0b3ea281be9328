"""Generation gives what the plain forward pass would, whatever is batched, padded or chunked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.errors import UsageError
from smollm_jax.generate import NO_TOKEN, Sampling, generate, sample

PROMPTS = [[5, 17, 400], [9], list(range(100, 140))]


def new_tokens(model, prompts, **options):
    return np.concatenate(list(generate(model, prompts, **({"max_new_tokens": 12} | options))), axis=1)


def test_greedy_with_a_cache_equals_greedy_without(tiny_model):
    forward = jax.jit(lambda model, tokens: model(tokens))
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(12):
            padded = np.zeros((1, 64), np.int32)
            padded[0, : len(ids)] = ids
            ids.append(int(forward(tiny_model, jnp.asarray(padded))[0, len(ids) - 1].argmax()))
        assert new_tokens(tiny_model, [prompt])[0].tolist() == ids[len(prompt) :]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=3)])
def test_a_prompt_gives_the_same_text_alone_and_in_a_batch(tiny_model, sampling):
    together = new_tokens(tiny_model, PROMPTS, sampling=sampling)
    for row, prompt in zip(together, PROMPTS, strict=True):
        np.testing.assert_array_equal(row, new_tokens(tiny_model, [prompt], sampling=sampling)[0])


@pytest.mark.parametrize("tokens_per_call", [1, 5, 12, 64])
def test_the_size_of_a_piece_changes_nothing(tiny_model, tokens_per_call):
    pieces = new_tokens(tiny_model, PROMPTS, tokens_per_call=tokens_per_call)
    np.testing.assert_array_equal(pieces, new_tokens(tiny_model, PROMPTS))


def test_a_row_ends_at_its_own_eos(tiny_model):
    free = new_tokens(tiny_model, PROMPTS)
    eos = int(free[0, 4])
    stopped = new_tokens(tiny_model, PROMPTS, eos_token_ids=[eos])
    for row, whole in zip(stopped, free, strict=True):
        end = whole.tolist().index(eos) + 1 if eos in whole else len(whole)
        np.testing.assert_array_equal(row[:end], whole[:end])
        assert (row[end:] == NO_TOKEN).all()
    alone = new_tokens(tiny_model, PROMPTS[:1], eos_token_ids=[eos], tokens_per_call=2)
    assert alone.shape[1] <= 6, "decoding went on after every row had ended"


def test_seeds_differ_and_repeat(tiny_model):
    def draw(seed):
        return new_tokens(tiny_model, PROMPTS, sampling=Sampling(temperature=1.0, seed=seed)).tolist()

    assert draw(0) == draw(0) != draw(1)


def test_the_narrowest_sampling_is_greedy(tiny_model):
    greedy = new_tokens(tiny_model, PROMPTS)
    for narrow in (Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=1e-9)):
        np.testing.assert_array_equal(new_tokens(tiny_model, PROMPTS, sampling=narrow), greedy)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 0.8), (1.5, 3, 1.0), (1.0, 6, 0.6)]
)
def test_samples_follow_the_cut_distribution(temperature, top_k, top_p):
    logits = np.array([2.0, 1.0, 1.5, -1.0, 0.5, 0.0, -3.0, 1.2])
    p = np.exp(logits / temperature)
    order = np.argsort(-p)
    keep = order[: top_k or None]
    p[np.setdiff1d(order, keep)] = 0
    p /= p.sum()
    keep = keep[: int(np.searchsorted(np.cumsum(p[keep]), top_p)) + 1]
    p[np.setdiff1d(order, keep)] = 0
    p /= p.sum()
    keys = jax.random.split(jax.random.key(0), 100_000)
    draws = jax.vmap(lambda key: sample(jnp.asarray(logits)[None], key, temperature, top_k, top_p)[0])(keys)
    counts = np.bincount(np.asarray(draws), minlength=8)
    assert set(np.flatnonzero(counts)) == set(np.flatnonzero(p))
    kept = p > 0
    chi_square = ((counts[kept] - 1e5 * p[kept]) ** 2 / (1e5 * p[kept])).sum()
    assert chi_square < 30  # at most 7 degrees of freedom: p < 1e-4 beyond


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompts": []}, "at least one token"),
        ({"prompts": [[1], []]}, "at least one token"),
        ({"prompts": [[1, 49_152]]}, "49152"),
        ({"prompts": [[-1]]}, "-1"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 512}, "exceed the context of 512"),
    ],
)
def test_what_cannot_be_generated_is_refused(tiny_model, change, named):
    with pytest.raises(UsageError, match=named):
        new_tokens(tiny_model, **({"prompts": PROMPTS} | change))


@pytest.mark.parametrize(
    "change", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}]
)
def test_sampling_that_makes_no_sense_is_refused(change):
    with pytest.raises(UsageError, match=next(iter(change))):
        Sampling(**change)
