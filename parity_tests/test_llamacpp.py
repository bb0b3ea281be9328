"""llama.cpp with our GGUF tokenizes texts to the same ids and generates the same greedy text. Part of `make soak`."""

import sys

import jax.numpy as jnp
import llama_cpp
import numpy as np
import pytest

from parity_tests.test_handover import answer, served
from smollm_jax import weights
from smollm_jax.config.finetune_recipe import LORA_TARGETS
from smollm_jax.data.text import documents
from smollm_jax.data.text_sources import text_files
from smollm_jax.generation.engine import Engine
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.weights.adapter import Adapter, merge_adapter, projection_shape
from smollm_jax.weights.gguf_adapter import write_gguf_adapter
from smollm_parity.tolerances import ARGMAX_MARGIN

PROMPTS = 20
NEW_TOKENS = 48
ODD = [
    "In 1861, 75,000 men; 3.14159 and 1_000_000.",
    "def f(x):\n    return x ** 2  # squared\n\n\tprint(f'{x!r}')\n",
    "naïve façade, Привет мир, 你好世界, שלום, 👍🏽 🇨🇭",
    "  leading and trailing  \n\n\n",
    "it's we'll I'd THEY'VE don’t",
]


def load(path, **options):
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    return llama_cpp.Llama(str(path), n_ctx=256, n_gpu_layers=0, logits_all=True, verbose=False, **exact, **options)


@pytest.fixture(scope="module")
def gguf(source, exported, tmp_path_factory):
    """GGUF files of the real weights and of a run trained here."""
    path = tmp_path_factory.mktemp("gguf") / f"{exported.name}.gguf"
    weights.write(path, weights.read(source), "gguf")
    return path


@pytest.fixture(scope="module")
def llama(gguf):
    return load(gguf)


@pytest.fixture(scope="module")
def ours(source):
    """The model and the tokenizer."""
    return weights.load(source)[0], Tokenizer.load(source)


@pytest.fixture(scope="module")
def passages(text_path):
    """495 passages of the real speeches, and unusual texts."""
    texts = [next(iter(documents(file))) for file in text_files(text_path)[:99]]
    return [text[start : start + 300] for text in texts for start in range(1000, 6000, 1000)] + ODD


def test_five_hundred_texts_are_the_same_tokens(llama, ours, passages):
    assert len(passages) == 500
    for text in passages:
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == ours[1].encode(text)


def test_greedy_text_is_the_same(llama, ours, passages):
    """If a token differs, the two likeliest logits must be closer than float32's rounding error."""
    (model, tokenizer), ties = ours, 0
    for text in passages[:PROMPTS]:
        ids = tokenizer.encode(text)[:40]
        llama.reset()
        llama.eval(ids)
        for _ in range(NEW_TOKENS):
            ids.append(int(np.argmax(llama.scores[len(ids) - 1])))
            llama.eval(ids[-1:])
        logits = np.asarray(model(jnp.asarray([ids])))[0, 39:-1]
        chosen = logits[np.arange(NEW_TOKENS), ids[40:]]
        wrong = logits.max(axis=1) != chosen
        assert (logits.max(axis=1) - chosen)[wrong].max(initial=0) < ARGMAX_MARGIN
        ties += int(wrong.sum())
    print(f"{PROMPTS} texts of {NEW_TOKENS} tokens: {ties} near-ties")
    assert ties <= 2


@pytest.mark.parametrize(("kind", "bound"), [("f16", 3e-3), ("bf16", 2e-2), ("q8_0", 5e-2)])
def test_every_smaller_type_computes_what_its_numbers_say(tmp_path, weights_path, passages, tokenizer, kind, bound):
    """RMS error of logits. llama.cpp rounds activations to the type of the matrix; for f32 see above."""
    weights.write(tmp_path / "x.gguf", weights.read(weights_path), "gguf", gguf_type=kind)
    ids = tokenizer.encode(passages[0])[:64]
    llama = load(tmp_path / "x.gguf")
    llama.eval(ids)
    expected = np.asarray(weights.load(tmp_path / "x.gguf")[0](jnp.asarray([ids])))[0]
    error = np.sqrt(np.mean(np.square(llama.scores[: len(ids)] - expected)) / np.mean(np.square(expected)))
    print(f"{kind}: logits {error:.1e}")
    assert error < bound


def test_its_server_answers_as_our_engine_does(instruct_export, tmp_path):
    """docs/serving.md's command, asked over HTTP: the chat template is the one in the file."""
    weights.write(tmp_path / "x.gguf", weights.read(instruct_export), "gguf")
    chat = [{"role": "user", "content": "Name the capital of France."}]
    with served(tmp_path, sys.executable, "-m", "llama_cpp.server", "--model", tmp_path / "x.gguf") as address:
        output = answer(address, chat, "x")
    engine = Engine.load(instruct_export)
    assert output == engine.complete([engine.chat(chat)], max_new_tokens=12)[0].text


def test_greedy_text_with_an_adapter_is_that_of_the_merged_weights(weights_path, passages, tmp_path):
    """llama.cpp's --lora, given our GGUF of an adapter whose B is not zero."""
    plain = weights.read(weights_path)
    draw, tensors, rank = np.random.default_rng(0), {}, 8
    for target in LORA_TARGETS:
        out_size, in_size = projection_shape(plain.config, target)
        shapes = (plain.config.num_hidden_layers, rank, in_size), (plain.config.num_hidden_layers, out_size, rank)
        tensors[target] = tuple(draw.normal(0, 0.02, shape).astype(np.float32) for shape in shapes)
    adapter = Adapter(tensors, rank, 16.0)
    weights.write(tmp_path / "base.gguf", plain, "gguf")
    write_gguf_adapter(tmp_path / "adapter.gguf", adapter, plain.config)
    model, tokenizer = weights.from_bundle(merge_adapter(plain, adapter)), Tokenizer.load(weights_path)
    without, llama = (
        load(tmp_path / "base.gguf"),
        load(tmp_path / "base.gguf", lora_path=str(tmp_path / "adapter.gguf")),
    )
    changed = 0
    for text in passages[:PROMPTS]:
        ids = tokenizer.encode(text)[:40]
        for each in (llama, without):
            each.reset()
            each.eval(ids)
        changed += int(np.argmax(llama.scores[39]) != np.argmax(without.scores[39]))
        logits = np.asarray(model(jnp.asarray([ids])))[0]
        theirs = llama.scores[: len(ids)]
        assert np.abs(logits - theirs).max() < 2e-3 * np.abs(logits).max()
        wrong = theirs.argmax(axis=1) != logits.argmax(axis=1)
        lost = logits.max(axis=1) - np.take_along_axis(logits, theirs.argmax(axis=1)[:, None], 1)[:, 0]
        assert lost[wrong].max(initial=0) < ARGMAX_MARGIN
    assert changed, "the adapter changes no token: any file would do"
