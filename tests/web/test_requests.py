"""Every value of a request is checked by name and range before anything is computed."""

from typing import Any

import pytest

from smollm_jax.errors import UsageError, short_repr
from smollm_jax.generation.sampling import Sampling
from smollm_jax.web import requests
from smollm_jax.web.middleware import MAX_BODY
from smollm_jax.web.requests import MAX_MESSAGES, SLIDERS, generation_request

NUMBERS = {name: slider.default for name, slider in SLIDERS.items()}


@pytest.mark.parametrize("name", SLIDERS)
def test_a_slider_takes_its_ends_and_nothing_beyond_or_of_another_type(name):
    slider = SLIDERS[name]
    for value in (slider.low, slider.high, slider.default):
        assert requests.number(name, value) == value
        assert type(requests.number(name, value)) is (int if slider.whole else float)
    for value in (slider.low - 0.001, slider.high + 0.001, float("nan"), float("inf"), "1", None, [1], True):
        kind = "a whole number" if slider.whole else "a number"
        with pytest.raises(UsageError) as raised:
            requests.number(name, value)
        limits = f"from {slider.low:g} to {slider.high:.10g}"
        assert str(raised.value) == f"{name} must be {kind} {limits}, got {short_repr(value)}"
    if slider.whole:
        assert requests.number(name, float(slider.low + 1)) == slider.low + 1
        with pytest.raises(UsageError, match=f"{name} must be a whole number"):
            requests.number(name, slider.low + 0.5)


def test_a_request_has_the_sliders_numbers_and_the_stop_strings():
    numbers = NUMBERS | {"max_new_tokens": 7.0, "temperature": 1, "top_k": 5, "top_p": 0.5, "min_p": 0.25, "seed": 9}
    request = generation_request(numbers | {"repetition_penalty": 1.5}, "a\\nb\n\nc d")
    assert request.max_new_tokens == 7
    assert request.sampling == Sampling(1.0, 5, 0.5, 0.25, 1.5, 9)
    assert request.stop == ("a\nb", "c d")
    assert generation_request(NUMBERS, "").stop == ()


def test_stop_strings_are_eight_lines_of_a_hundred_bytes():
    assert requests.stop_strings("\n".join("abcdefgh")) == tuple("abcdefgh")
    assert requests.stop_strings("é" * 50) == ("é" * 50,)
    for value in ("\n".join("abcdefghi"), "é" * 50 + "a", "\ud800" * 34):
        with pytest.raises(UsageError, match=r"^stop: the limit is 8 lines of 100 bytes each$"):
            requests.stop_strings(value)
    with pytest.raises(UsageError, match=r"^stop must be a string, got \['a'\]"):
        requests.stop_strings(["a"])


def test_a_text_is_a_string_of_bounded_bytes():
    assert requests.text("prompt", "é" * (MAX_BODY // 2)) == "é" * (MAX_BODY // 2)
    with pytest.raises(UsageError, match=r"^prompt has 262,145 bytes, the limit is 262,144$"):
        requests.text("prompt", "é" * (MAX_BODY // 2) + "a")
    with pytest.raises(UsageError, match=r"^prompt must be a string, got 5$"):
        requests.text("prompt", 5)


def turn(role: Any = "user", content: Any = "a") -> dict[str, Any]:
    return {"role": role, "content": content}


def test_a_chat_is_a_list_of_turns_without_anything_else():
    turns = [turn(), turn("assistant", "b")]
    assert requests.conversation([turn() | {"metadata": {"path": "/etc"}}, turns[1]]) == turns
    assert requests.conversation([]) == []
    assert len(requests.conversation([turn()] * MAX_MESSAGES)) == MAX_MESSAGES
    half = "a" * (MAX_BODY // 2)
    assert len(requests.conversation([turn(content=half)] * 2)) == 2
    for value, named in (
        ([turn()] * (MAX_MESSAGES + 1), "the chat must be a list of at most 200 messages"),
        ("a", "the chat must be a list of at most 200 messages"),
        ([1], "a message's role must be user or assistant, got None"),
        ([turn("system")], "a message's role must be user or assistant, got 'system'"),
        ([turn(content=None)], "a message must be a string, got None"),
        ([turn(content=half)] * 2 + [turn()], "the chat has 262,145 bytes, the limit is 262,144"),
    ):
        with pytest.raises(UsageError, match=f"^{named}$"):
            requests.conversation(value)


def test_a_choice_is_one_of_the_options():
    assert requests.choice("run", "a", {"a": 1}) == "a"
    for value in ("b", None, 1, ["a"]):
        with pytest.raises(UsageError) as raised:
            requests.choice("run", value, {"a": 1})
        assert str(raised.value) == f"run: {short_repr(value)} is not one of the options listed on the page"
