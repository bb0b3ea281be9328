"""Rung 8: greedy text from the cache equals Hugging Face's `generate`, token for token."""

import numpy as np
import pytest
import torch

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
