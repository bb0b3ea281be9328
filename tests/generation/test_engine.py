"""The engine's text: complete characters, stop strings, ends, log-probabilities; the same alone and in a batch."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smollm_jax.errors import UsageError
from smollm_jax.generation import generate, programs
from smollm_jax.generation.engine import Engine, StopStringFilter
from smollm_jax.generation.sampling import Sampling
from smollm_jax.model.smollm import SmolLM

SAID = "A star 🌟, naïve Grüße; then 日本語 <stop> never"
EOS = 2
WARM = Sampling(temperature=1.0, top_k=40, repetition_penalty=1.1, seed=11)


@pytest.fixture(scope="module")
def engine(tiny_model, tokenizer):
    return Engine(tiny_model, tokenizer)


@pytest.fixture(scope="module")
def parrot(tiny, tokenizer):
    """An engine that generates one fixed text after the text's first token, then eos.

    Attention and MLP add nothing, and the head points from each token's embedding to the next token.
    """
    chain = [*tokenizer.encode(SAID), EOS]
    assert len(set(chain)) == len(chain), "the text repeats a token, and the parrot has no memory"
    config = dataclasses.replace(tiny, tie_word_embeddings=False, eos_token_id=(5, EOS))
    model = SmolLM(config, key=jax.random.key(0))
    head = np.zeros((config.vocab_size, config.hidden_size), np.float32)
    head[chain[1:]] = np.asarray(model.embed_tokens)[chain[:-1]]
    model.lm_head = nnx.Param(jnp.asarray(head))
    for parameter in (model.layers.self_attn.o_proj, model.layers.mlp.down_proj):
        parameter[...] = jnp.zeros_like(parameter[...])
    return Engine(model, tokenizer)


def first(parrot):
    return parrot.encode(SAID)[:1]


def rest(parrot):
    return parrot.tokenizer.decode(parrot.encode(SAID)[1:])


def test_a_streamed_text_is_whole_characters_and_ends_before_eos(parrot):
    pieces = list(parrot.stream([first(parrot)], max_new_tokens=60))
    assert "".join(piece.text for piece in pieces) == rest(parrot)
    assert not any("\ufffd" in piece.text for piece in pieces)
    assert any(len(piece.tokens) == 1 and piece.text == "" for piece in pieces), "no character was ever under way"
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish == "eos"
    ids = [token.id for piece in pieces for token in piece.tokens]
    assert ids == [*parrot.encode(SAID)[1:], EOS]
    assert pieces[-1].tokens[-1].text == ""


def test_eos_as_the_last_token_allowed_ends_the_text_and_not_the_limit(parrot):
    ids = parrot.encode(SAID)[1:]
    for allowed, finish in ((len(ids), "length"), (len(ids) + 1, "eos")):
        (done,) = parrot.complete([first(parrot)], max_new_tokens=allowed)
        assert (done.text, done.finish, len(done.tokens)) == (rest(parrot), finish, allowed)


@pytest.mark.parametrize("tokens_per_call", [1, 8])
@pytest.mark.parametrize(
    "stop",
    [
        ["<stop>"],
        ["never", "op> n", "zzz"],
        ["🌟"],
        ["naïve Grüße; then 日本語 <stop> never!"],
        ["语", "日本語 <stop> neve"],
        [" never", "<stop> never"],
    ],
    ids=str,
)
def test_a_text_ends_before_the_first_stop_string(parrot, stop, tokens_per_call):
    whole = rest(parrot)
    positions = [whole.find(string) for string in stop if string in whole]
    (done,) = parrot.complete([first(parrot)], max_new_tokens=60, stop=stop, tokens_per_call=tokens_per_call)
    assert done.text == whole[: min(positions, default=len(whole))]
    assert done.finish == ("stop" if positions else "eos")
    decoded = parrot.tokenizer.decode([token.id for token in done.tokens if token.id != EOS])
    assert decoded.startswith(done.text)
    if positions:
        without_last = parrot.tokenizer.decode([token.id for token in done.tokens[:-1]])
        assert not any(string in without_last for string in stop), "it went on after the stop string"


def test_nothing_of_a_stop_string_is_shown_before_it_is_sure(parrot):
    text = ""
    for piece in parrot.stream([first(parrot)], max_new_tokens=60, stop=["<stop>"]):
        text += piece.text
        assert "<" not in text
    assert piece.finish == "stop"


def test_what_only_began_like_a_stop_string_is_shown_after_all(parrot):
    (done,) = parrot.complete([first(parrot)], max_new_tokens=60, stop=["never more", "neverland"])
    assert (done.text, done.finish) == (rest(parrot), "eos")
    count = len(parrot.encode("A star 🌟, na")) - 1
    (cut,) = parrot.complete([first(parrot)], max_new_tokens=count, stop=["naughty"])
    assert (cut.text, cut.finish, len(cut.tokens)) == (" star 🌟, na", "length", count)


def test_a_text_cut_inside_a_character_says_so(parrot):
    ids = parrot.encode(SAID)
    inside = next(n for n in range(1, len(ids)) if "\ufffd" in parrot.tokenizer.decode(ids[1 : n + 1]))
    (done,) = parrot.complete([first(parrot)], max_new_tokens=inside)
    assert done.text == parrot.tokenizer.decode(ids[1 : inside + 1])
    assert done.finish == "length"


def test_held_text_is_released_in_order(tokenizer):
    text = StopStringFilter(tokenizer, ["abc", "bcd"])
    shown = [text.add(i) for letter in "xababx" for i in tokenizer.encode(letter)]
    assert shown == ["x", "", "", "ab", "", "abx"]
    assert [text.add(i) for letter in "xbcd" for i in tokenizer.encode(letter)] == ["x", "", "", ""]
    assert text.stopped
    assert text.end() == ""


PROMPTS = [[5, 17, 400], [9], list(range(100, 170))]


@pytest.mark.parametrize("sampling", [pytest.param(Sampling(), marks=pytest.mark.slow), WARM], ids=["greedy", "warm"])
def test_a_stream_a_completion_and_the_programs_give_the_same_tokens(engine, tiny_model, sampling):
    done = engine.complete(PROMPTS, max_new_tokens=20, sampling=sampling)
    rows = np.concatenate(
        list(generate.generate(tiny_model, PROMPTS, max_new_tokens=20, sampling=sampling, eos_token_ids=(0,))), axis=1
    )
    for row, (completion, ids) in enumerate(zip(done, rows, strict=True)):
        assert [token.id for token in completion.tokens] == ids[ids != programs.PAD_ID].tolist()
        alone = list(engine.stream(PROMPTS[row : row + 1], max_new_tokens=20, sampling=sampling))
        assert "".join(piece.text for piece in alone) == completion.text
        assert completion.prompt_tokens == len(PROMPTS[row])
        assert sum(piece.finish is not None for piece in alone) == 1


def test_log_probabilities_are_the_models_own(engine, tiny_model):
    """Those of the unmodified softmax, whatever the sampling, for the chosen token and the likeliest ones."""
    for prompt in PROMPTS:
        (done,) = engine.complete([prompt], max_new_tokens=6, sampling=WARM, alternatives=5)
        ids = prompt + [token.id for token in done.tokens]
        truth = np.asarray(jax.nn.log_softmax(tiny_model(jnp.asarray([ids]))[0]))[len(prompt) - 1 :]
        for token, row in zip(done.tokens, truth, strict=False):
            assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
            best = np.argsort(-row)[:5]
            assert [i for i, _, _ in token.alternatives] == best.tolist()
            np.testing.assert_allclose([number for _, _, number in token.alternatives], row[best], atol=1e-4)
            assert token.alternatives[0][1] == engine.tokenizer.decode([int(best[0])])
    (done,) = engine.complete([[5]], max_new_tokens=3, alternatives=0)
    assert all(token.alternatives == () and token.logprob <= 0 for token in done.tokens)
    (done,) = engine.complete([[5]], max_new_tokens=3)
    assert all(token.logprob is None for token in done.tokens)


def test_streams_of_several_threads_do_not_touch_each_other(engine):
    prompts = [[i + 3, 17, 400] for i in range(4)]
    samplings = [dataclasses.replace(WARM, seed=i) for i in range(4)]

    def write(i):
        (done,) = engine.complete([prompts[i]], max_new_tokens=24, sampling=samplings[i], tokens_per_call=1)
        return done.text, engine.encode(f"{i} <|im_end|>"), engine.chat([{"role": "user", "content": str(i)}])

    alone = [write(i) for i in range(4)]
    together: list = [None] * 4
    threads = [
        threading.Thread(target=lambda i=i: together.__setitem__(i, [write(i) for _ in range(3)])) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [[completion] * 3 for completion in alone]


def test_closing_a_stream_ends_its_computing_within_one_token(engine, monkeypatch):
    steps = []
    decode = programs.decode
    monkeypatch.setattr(programs, "decode", lambda m, s, k, n, **o: steps.append(n) or decode(m, s, k, n, **o))
    pieces = engine.stream([[5, 17]], max_new_tokens=300)
    seen = [next(pieces) for _ in range(4)]
    pieces.close()
    # The first token is the prefill's; every later one had its call, and one more was under way.
    assert sum(steps) == sum(len(piece.tokens) for piece in seen)
    assert next(pieces, None) is None


def test_a_full_context_is_refused_or_slides(tokenizer, tiny):
    engine = Engine(SmolLM(dataclasses.replace(tiny, max_position_embeddings=24), key=jax.random.key(0)), tokenizer)
    with pytest.raises(UsageError, match="context of 24"):
        engine.stream([[5] * 20], max_new_tokens=5)
    (done,) = engine.complete([[5] * 20], max_new_tokens=40, context="slide")
    assert len(done.tokens) == 40
    ids = [5] * 20 + [token.id for token in done.tokens]
    (fresh,) = engine.complete([ids[25 - 12 : 25]], max_new_tokens=12)
    assert [token.id for token in fresh.tokens] == ids[25:37]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompts": []}, "at least one token"),
        ({"prompts": [[1], []]}, "at least one token"),
        ({"prompts": "text"}, "token ids"),
        ({"prompts": ["text"]}, "token ids"),
        ({"prompts": [1, 2]}, "token ids"),
        ({"prompts": None}, "token ids"),
        ({"prompts": [[49_152]]}, "49152"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"max_new_tokens": 512}, "context of 512"),
        ({"stop": "word"}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": [3]}, "stop"),
        ({"stop": None}, "stop"),
        ({"sampling": None}, "sampling"),
        ({"sampling": {"temperature": 1.0}}, "sampling"),
        ({"alternatives": 21}, "alternatives"),
        ({"alternatives": -1}, "alternatives"),
        ({"alternatives": True}, "alternatives"),
        ({"context": "wrap"}, "context"),
        ({"sampling": [Sampling()] * 2}, "sampling"),
        ({"tokens_per_call": 0}, "tokens_per_call"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_at_the_call(engine, change, named):
    with pytest.raises(UsageError, match=named) as caught:
        engine.stream(**({"prompts": [[1, 2]], "max_new_tokens": 4} | change))
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=named):
        engine.complete(**({"prompts": [[1, 2]], "max_new_tokens": 4} | change))
