"""Generation gives the tokens of the plain forward pass, however prompts are batched, padded or chunked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.errors import UsageError
from smollm_jax.generation import programs
from smollm_jax.generation.generate import Session, generate, stream_tokens
from smollm_jax.generation.programs import PAD_ID, DecodeOutput, buckets
from smollm_jax.generation.sampling import Sampling
from smollm_jax.generation.unrolled import Unrolled
from smollm_jax.model.attention import KVCache, cached
from smollm_jax.model.smollm import SmolLM

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


ALL_KNOBS = Sampling(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=3)


@pytest.mark.parametrize("sampling", [Sampling(), ALL_KNOBS, Sampling(repetition_penalty=1.5)])
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
        assert (row[end:] == PAD_ID).all()
    alone = new_tokens(tiny_model, PROMPTS[:1], eos_token_ids=[eos], tokens_per_call=2)
    assert alone.shape[1] <= 6, "decoding went on after every row had ended"


def test_every_row_may_end_at_another_eos(tiny_model):
    free = new_tokens(tiny_model, PROMPTS).tolist()
    eos = [row[3 + i] for i, row in enumerate(free)]
    ends = [1 + min(row.index(token) for token in eos if token in row) for row in free]
    rows = new_tokens(tiny_model, PROMPTS, eos_token_ids=eos)
    assert [row[row != PAD_ID].tolist() for row in rows] == [row[:end] for row, end in zip(free, ends, strict=True)]
    assert len({row[end - 1] for row, end in zip(free, ends, strict=True)}) > 1, "all rows ended at the same one"


def test_a_decoding_call_gives_its_state_s_memory_to_the_next(tiny_model, monkeypatch):
    """The state is donated, otherwise every token would copy the cache."""
    states, decode = [], programs.decode
    monkeypatch.setattr(
        programs, "decode", lambda model, state, *a, **b: states.append(state) or decode(model, state, *a, **b)
    )
    new_tokens(tiny_model, PROMPTS, max_new_tokens=4, tokens_per_call=1)
    assert len(states) == 3
    assert all(x.is_deleted() for state in states for x in (state.cache.keys, state.cache.values, state.seen))


def test_seeds_differ_and_repeat(tiny_model):
    def draw(seed):
        return new_tokens(tiny_model, PROMPTS, sampling=Sampling(temperature=1.0, seed=seed)).tolist()

    assert draw(0) == draw(0) != draw(1)


def test_the_narrowest_sampling_is_greedy(tiny_model):
    greedy = new_tokens(tiny_model, PROMPTS)
    for narrow in (Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=1e-9)):
        np.testing.assert_array_equal(new_tokens(tiny_model, PROMPTS, sampling=narrow), greedy)


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


def test_rows_of_one_batch_may_be_chosen_in_different_ways(tiny_model):
    samplings = [ALL_KNOBS, Sampling(), Sampling(temperature=0.8, seed=2**32 - 1)]
    together = new_tokens(tiny_model, PROMPTS, sampling=samplings)
    for row, prompt, sampling in zip(together, PROMPTS, samplings, strict=True):
        np.testing.assert_array_equal(row, new_tokens(tiny_model, [prompt], sampling=sampling)[0])


def test_the_repetition_penalty_counts_prompt_and_text(tiny_model):
    """A penalty larger than all logits leaves only tokens that have not occurred."""
    row = new_tokens(tiny_model, [[5, 17, 400]], max_new_tokens=40, sampling=Sampling(repetition_penalty=1e6))[0]
    assert len({5, 17, 400, *row.tolist()}) == 43
    assert len(set(new_tokens(tiny_model, [[5, 17, 400]], max_new_tokens=40)[0].tolist())) < 40


@pytest.mark.parametrize("sampling", [Sampling(), ALL_KNOBS])
def test_layers_laid_out_for_decoding_give_the_same_text(tiny_model, sampling):
    stacked, unrolled = (
        new_tokens(m, PROMPTS, sampling=sampling) for m in (tiny_model, Unrolled.from_model(tiny_model))
    )
    np.testing.assert_array_equal(stacked, unrolled)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_layers_laid_out_give_the_models_logits(tiny, dtype):
    untied = dataclasses.replace(tiny, tie_word_embeddings=False)
    for config in (tiny, untied):
        model = jax.tree.map(lambda x: x.astype(dtype), SmolLM(config, key=jax.random.key(1)))
        unrolled = Unrolled.from_model(model)
        start, token = jnp.asarray([0, 3], jnp.int32), jnp.asarray([[7], [300]], jnp.int32)
        cache, _ = programs.prefill(model, jnp.arange(20).reshape(2, 10), start, cache_size=16)
        positions, attend = (cache.length - start)[:, None], cached(start)
        hidden, after = model.hidden_states(token, positions=positions, attend=attend, cache=cache)
        theirs, other = unrolled.hidden_states(token, positions=positions, attend=attend, cache=cache)
        close = {"rtol": 0, "atol": 1e-5 if dtype == jnp.float32 else 0.1}  # measured: 2.6e-6, 0.039
        np.testing.assert_allclose(model.logits(hidden), unrolled.logits(theirs), **close)
        assert unrolled.logits(theirs).dtype == jnp.float32, "rounded to bfloat16, equal logits decide by their order"
        np.testing.assert_allclose(*(np.asarray(c.keys, np.float32) for c in (after, other)), **close)


def test_a_cache_that_grows_changes_nothing(tiny_model, monkeypatch):
    whole = new_tokens(tiny_model, PROMPTS, max_new_tokens=200)
    monkeypatch.setattr(programs, "SMALLEST_CACHE", 64)  # then 128, 256
    grown = programs.grow_cache._cache_size()
    np.testing.assert_array_equal(new_tokens(tiny_model, PROMPTS, max_new_tokens=200), whole)
    assert programs.grow_cache._cache_size() == grown + 2


def test_prompts_of_any_length_in_a_context_of_8192_call_for_8_prefill_programs(tiny, monkeypatch):
    """Counts shapes and static arguments of the calls, because compiling all eight takes 10 seconds."""
    config = dataclasses.replace(tiny, vocab_size=64, max_position_embeddings=8192, num_hidden_layers=1)
    assert buckets(config) == [64, 128, 256, 512, 1024, 2048, 4096, 8192]
    called = set()

    def prefill(model, tokens, start, length, *, cache_size):
        called.add((tokens.shape, cache_size))
        raise InterruptedError

    monkeypatch.setattr(programs, "prefill", prefill)
    model = jax.eval_shape(lambda: SmolLM(config, key=jax.random.key(0)))
    for length in (1, *(edge - 1 for edge in buckets(config)), *(edge + 1 for edge in buckets(config)[:-1])):
        with pytest.raises(InterruptedError):
            new_tokens(model, [[1] * length], max_new_tokens=1)
    assert len(called) == 8


def test_any_length_of_prompt_needs_at_most_one_program_a_bucket(tiny, tiny_model):
    assert buckets(dataclasses.replace(tiny, max_position_embeddings=100)) == [64, 100]
    assert buckets(dataclasses.replace(tiny, max_position_embeddings=20)) == [20]
    for function in (programs.prefill, programs.sample_first, programs.decode):
        function.clear_cache()
    rng = np.random.default_rng(0)
    lengths = [1, 2, 63, 64, 65, 127, 128, 129, 200, 256, 257, 300, 500, 509]
    for length in lengths:  # and each with another sampling, whose numbers cost nothing
        sampling = Sampling(rng.random(), int(rng.integers(9)), 0.5 + rng.random() / 2, rng.random(), 1.1, length)
        new_tokens(tiny_model, [[1] * length], max_new_tokens=2, sampling=sampling)
    assert programs.prefill._cache_size() == 4  # 64, 128, 256, 512
    assert programs.decode._cache_size() == 1
    for count in (2, 3, 4):
        new_tokens(tiny_model, [[1] * 5] * count, max_new_tokens=2)
    assert programs.prefill._cache_size() == 6, "3 rows take the program of 4"


@pytest.mark.parametrize("longer", [65, *(pytest.param(longer, marks=pytest.mark.slow) for longer in (64, 130, 300))])
def test_the_bucket_of_a_prompt_changes_nothing(tiny_model, longer):
    """Batched with a longer prompt, the same prompt is padded to a larger bucket."""
    alone = new_tokens(tiny_model, [[5, 17, 400]])
    together = new_tokens(tiny_model, [[5, 17, 400], list(range(longer))])
    np.testing.assert_array_equal(together[:1], alone)


def slid(model, prompts, **options):
    options = {"samplings": [Sampling()] * len(prompts), "slide": True} | options
    return np.concatenate([chosen.ids for chosen in stream_tokens(model, prompts, **options)], axis=1)


@pytest.fixture(scope="module")
def short_model(tiny):
    """A model with a short context."""
    return SmolLM(dataclasses.replace(tiny, max_position_embeddings=32), key=jax.random.key(0))


@pytest.mark.parametrize("tokens_per_call", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_a_full_context_slides_to_its_last_half_as_a_fresh_prompt(short_model, tokens_per_call):
    prompt = list(range(40, 65))  # 25, so 8 more tokens are chosen before the 33rd must go
    row = slid(short_model, [prompt], max_new_tokens=50, tokens_per_call=tokens_per_call)[0].tolist()
    whole = prompt + row
    assert row[:7] == new_tokens(short_model, [prompt], max_new_tokens=7)[0].tolist()
    for full in (33, 50, 67):  # tokens, when the context is full; a fresh start has 16 of them
        fresh = new_tokens(short_model, [whole[full - 16 : full]], max_new_tokens=8)[0].tolist()
        assert whole[full : full + 8] == fresh


@pytest.mark.slow
def test_rows_slide_each_at_its_own_time(short_model):
    prompts = [list(range(40, 65)), [9, 8]]
    together = slid(short_model, prompts, max_new_tokens=40, samplings=[ALL_KNOBS] * 2)
    for row, prompt in zip(together, prompts, strict=True):
        np.testing.assert_array_equal(row, slid(short_model, [prompt], max_new_tokens=40, samplings=[ALL_KNOBS])[0])


def test_a_row_that_has_ended_takes_no_context_from_the_others(short_model):
    """The longest row ends at once; the other can still use its whole context."""
    prompts = [list(range(40, 70)), [9, 8]]
    alone = slid(short_model, prompts[1:], max_new_tokens=28)[0]
    eos = int(slid(short_model, prompts[:1], max_new_tokens=1)[0, 0])
    assert eos not in alone
    both = slid(short_model, prompts, max_new_tokens=28, eos_token_ids=[eos])
    assert (both[0, 1:] == PAD_ID).all()
    np.testing.assert_array_equal(both[1], alone)


def test_the_repetition_penalty_remembers_what_slid_out_of_the_context(short_model, monkeypatch):
    """Nothing is computed: what the sampler is given as seen is the whole text, of which the cache has the last 16."""
    seen = []

    def sample_first(state, *_, **options):
        seen.append(np.flatnonzero(state.seen[0]).tolist())
        return state, DecodeOutput(np.array([[7]]), np.array([False]), None, None, None)

    cache = KVCache.empty(short_model.config, 1, 32, "float32")
    monkeypatch.setattr(programs, "prefill", lambda *_, **options: (cache, None))
    monkeypatch.setattr(programs, "sample_first", sample_first)
    options = {"eos_token_ids": (), "tokens_per_call": 1, "return_logprobs": False}
    session = Session(short_model, [list(range(40, 75))], max_new_tokens=9, samplings=[Sampling()], **options)
    for _ in range(2):
        session.prefill()
        session.collect()
    assert seen == [list(range(40, 75)), [7, *range(40, 75)]]
    assert session.windows == [[*range(59, 75), 7, 7]]


def test_a_prompt_longer_than_the_context_slides_before_it_starts(short_model):
    prompt = list(range(100))
    np.testing.assert_array_equal(
        slid(short_model, [prompt], max_new_tokens=5), new_tokens(short_model, [prompt[-16:]], max_new_tokens=5)
    )
    with pytest.raises(UsageError, match="exceed the context of 32"):
        new_tokens(short_model, [prompt])


def test_closing_the_iterator_leaves_at_most_one_more_call(tiny_model, monkeypatch):
    calls = []
    decode = programs.decode
    monkeypatch.setattr(programs, "decode", lambda *a, **b: calls.append(1) or decode(*a, **b))
    pieces = generate(tiny_model, [[1, 2]], max_new_tokens=400, tokens_per_call=1)
    for _ in range(5):
        next(pieces)
    pieces.close()
    assert len(calls) == 5  # the first token came from the prefill; four were read, one is under way
