"""Rung 8: greedy text from the cache equals Hugging Face's `generate`, token for token."""

import numpy as np
import pytest
import torch

from parity_tests import ladder
from parity_tests.tolerances import ARGMAX_MARGIN, within
from smollm_jax.generate import NO_TOKEN, generate

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
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        texts.append(out[0, ids.shape[1] :].tolist())
    return texts


@pytest.mark.parametrize("batched", [True, False])
def test_greedy_text_equals_hugging_faces(batched, jax_model, tokenizer, hf_texts):
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    eos = jax_model.config.eos_token_ids
    rows = []
    for group in [ids] if batched else [[one] for one in ids]:
        pieces = generate(jax_model, group, max_new_tokens=NEW_TOKENS, eos_token_ids=eos)
        rows += list(np.concatenate(list(pieces), axis=1))
    ours = [[int(token) for token in row if token != NO_TOKEN] for row in rows]
    assert ours == hf_texts
    assert any(len(text) == NEW_TOKENS for text in ours), "every text ended early: nothing was decoded at length"


LONG = 256


@pytest.mark.slow
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
        mine = [token for token in mine if token != NO_TOKEN]
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
