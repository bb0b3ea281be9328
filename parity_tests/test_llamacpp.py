"""llama.cpp, given our GGUF, reads texts as the same tokens and writes the same greedy text. Part of `make soak`."""

import llama_cpp
import numpy as np
import pytest

from parity_tests.tolerances import ARGMAX_MARGIN
from smollm_jax import weights
from smollm_jax.text import documents, text_files

PROMPTS = 20
NEW_TOKENS = 48
ODD = [
    "In 1861, 75,000 men; 3.14159 and 1_000_000.",
    "def f(x):\n    return x ** 2  # squared\n\n\tprint(f'{x!r}')\n",
    "naïve façade, Привет мир, 你好世界, שלום, 👍🏽 🇨🇭",
    "  leading and trailing  \n\n\n",
    "it's we'll I'd THEY'VE don’t",
]


@pytest.fixture(scope="module")
def llama(weights_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    weights.write(path, weights.read(weights_path), "gguf")
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    return llama_cpp.Llama(str(path), n_ctx=256, n_gpu_layers=0, logits_all=True, verbose=False, **exact)


@pytest.fixture(scope="module")
def passages(text_path):
    """495 passages of the real speeches, and the odd ones."""
    texts = [next(iter(documents(file))) for file in text_files(text_path)[:99]]
    return [text[start : start + 300] for text in texts for start in range(1000, 6000, 1000)] + ODD


def test_five_hundred_texts_are_the_same_tokens(llama, tokenizer, passages):
    assert len(passages) == 500
    for text in passages:
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)


def test_greedy_text_is_the_same(llama, tokenizer, passages, jax_model):
    """Where a token differs, the two likeliest must be closer than float32 can tell apart."""
    ties = 0
    for text in passages[:PROMPTS]:
        ids = tokenizer.encode(text)[:40]
        llama.reset()
        llama.eval(ids)
        for _ in range(NEW_TOKENS):
            ids.append(int(np.argmax(llama.scores[len(ids) - 1])))
            llama.eval(ids[-1:])
        logits = np.asarray(jax_model(np.array([ids])))[0, 39:-1]
        chosen = logits[np.arange(NEW_TOKENS), ids[40:]]
        wrong = logits.max(axis=1) != chosen
        assert (logits.max(axis=1) - chosen)[wrong].max(initial=0) < ARGMAX_MARGIN
        ties += int(wrong.sum())
    print(f"{PROMPTS} texts of {NEW_TOKENS} tokens: {ties} near-ties")
    assert ties <= 2
