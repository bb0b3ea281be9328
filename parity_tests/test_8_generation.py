"""Rung 8: greedy text from the cache equals Hugging Face's `generate`, token for token; so do penalty and cuts."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process

from smollm_jax.generation.generate import generate
from smollm_jax.generation.programs import PAD_ID
from smollm_jax.generation.sampling import BatchedSampling, Sampling, apply_repetition_penalty, filter_mask
from smollm_jax.generation.unrolled import Unrolled
from smollm_parity import ladder
from smollm_parity.tolerances import ARGMAX_MARGIN, within

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics state that",
    "Fellow-Citizens of the Senate and House of Representatives:",
    "Q: What is 12 + 34?\nA:",
    "Dear Sir or Madam,\n\nI am writing to",
    "List three fruits: 1.",
    "In 1969, the first man on the moon",
    "El perro está",
]
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def hf_texts(hf, tokenizer):
    """transformers' text of every prompt, each alone."""

    @functools.cache
    def texts(new_tokens: int) -> list[list[int]]:
        texts = []
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer.encode(prompt)])
            out = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
            texts.append(out[0, ids.shape[1] :].tolist())
        return texts

    return texts


@pytest.fixture(scope="module")
def unrolled(jax_model):
    return Unrolled.from_model(jax_model)


@pytest.mark.parametrize(
    ("layers", "batched", "new_tokens"),
    [
        ("unrolled", True, 16),
        pytest.param("unrolled", True, NEW_TOKENS, marks=pytest.mark.slow),
        pytest.param("unrolled", False, NEW_TOKENS, marks=pytest.mark.slow),
        pytest.param("stacked", True, NEW_TOKENS, marks=pytest.mark.slow),
    ],
)
def test_greedy_text_equals_hugging_faces(layers, batched, new_tokens, jax_model, unrolled, tokenizer, hf_texts):
    model = jax_model if layers == "stacked" else unrolled
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    eos = jax_model.config.eos_token_ids
    rows = []
    for group in [ids] if batched else [[prompt] for prompt in ids]:
        pieces = generate(model, group, max_new_tokens=new_tokens, eos_token_ids=eos)
        rows += list(np.concatenate(list(pieces), axis=1))
    ours = [[int(token) for token in row if token != PAD_ID] for row in rows]
    assert ours == hf_texts(new_tokens)
    assert any(len(text) == new_tokens for text in ours), "every text ended early: nothing was decoded at length"


def test_the_repetition_penalty_is_hugging_faces_to_one_rounding():
    """Where we divide, torch multiplies by the rounded reciprocal."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(4, 49_152)) * 10).astype(np.float32)
    ids = rng.integers(0, logits.shape[1], (4, 300))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    for penalty in (0.7, 1.1, 1.3, 5.0):
        theirs = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(ids), torch.tensor(logits))
        ours = apply_repetition_penalty(jnp.asarray(logits), jnp.asarray(seen), jnp.full(4, penalty, jnp.float32))
        np.testing.assert_array_max_ulp(np.asarray(ours), theirs.numpy(), maxulp=1)


@pytest.mark.slow
def test_greedy_text_with_a_penalty_equals_hugging_faces(unrolled, hf, tokenizer):
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS[:3]]
    sampling = Sampling(repetition_penalty=1.3)
    eos = unrolled.config.eos_token_ids
    rows = generate(unrolled, ids, max_new_tokens=NEW_TOKENS, sampling=sampling, eos_token_ids=eos)
    ours = [[int(i) for i in row if i != PAD_ID] for row in np.concatenate(list(rows), axis=1)]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "repetition_penalty": 1.3}
    for prompt, row in zip(ids, ours, strict=True):
        tokens = torch.tensor([prompt])
        assert row == hf.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_the_tokens_kept_are_hugging_faces(temperature):
    logits = (np.random.default_rng(1).normal(size=(1, 49_152)) * 3).astype(np.float32)
    for top_k, top_p, min_p in itertools.product([0, 1, 40, 3000], [1.0, 0.95, 0.5], [0.0, 0.05]):
        scores = logits_process.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
        for warper in (
            logits_process.TopKLogitsWarper(top_k) if top_k else None,
            logits_process.TopPLogitsWarper(top_p) if top_p < 1 else None,
            logits_process.MinPLogitsWarper(min_p) if min_p else None,
        ):
            scores = scores if warper is None else warper(None, scores)
        theirs = torch.softmax(scores, dim=-1).numpy()
        scaled = jnp.asarray((logits - logits.max()) / np.float32(temperature))
        ours = np.asarray(filter_mask(scaled, BatchedSampling.stack([Sampling(temperature, top_k, top_p, min_p)])))
        # Two ways to sum 49,152 numbers in float32 may cross top_p one unlikely token apart.
        assert theirs[ours != (theirs > 0)].sum() < 1e-5
        assert (ours != (theirs > 0)).sum() <= (1 if top_p < 1 else 0)


LONG = 256


@pytest.mark.overnight
def test_greedy_256_tokens_on_50_real_prompts(bundle, jax_model, hf, tokenizer, text_path):
    """A difference is accepted only where the truth prefers one token to the other by less than float32's noise."""
    ids = [tokenizer.encode(p.read_text(encoding="utf-8")) for p in sorted(text_path.glob("*.txt"))[::4][:50]]
    prompts = [document[len(document) // 2 :][:24] for document in ids]  # of one length: transformers needs no padding
    tokens = torch.tensor(prompts)
    options = {"max_new_tokens": LONG, "do_sample": False, "pad_token_id": 0}
    theirs = hf.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[:, tokens.shape[1] :].tolist()
    eos = jax_model.config.eos_token_ids
    ours = np.concatenate(list(generate(jax_model, prompts, max_new_tokens=LONG, eos_token_ids=eos)), axis=1).tolist()
    equal = 0
    for index, (prompt, mine, other) in enumerate(zip(prompts, ours, theirs, strict=True)):
        mine = [token for token in mine if token != PAD_ID]
        other = other[: len(mine)] if set(mine) & set(eos) else other  # after eos transformers pads
        if mine == other:
            equal += 1
            continue
        place = next(i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b)
        truth = ladder.jax_stream(bundle, np.array([prompt + mine[:place]]), "float64")[1][0, -1]
        margin = abs(truth[mine[place]] - truth[other[place]])
        print(f"prompt {index}: token {place} differs, float64 margin {margin:.1e}")
        within(margin, ARGMAX_MARGIN, f"float64 margin where greedy text {index} differs")
    print(f"{equal} of 50 greedy texts of up to {LONG} tokens are equal")
    assert equal >= 45, "so many near-ties are no accident"
