"""Our tokenizer gives the ids that transformers' AutoTokenizer gives from the same folder."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def theirs(weights_path):
    return AutoTokenizer.from_pretrained(weights_path)


@settings(max_examples=2000, deadline=None)
@given(text=st.text())
def test_ids_are_equal_on_any_text(tokenizer, theirs, text):
    if tokenizer.unencodable(text) is None:
        assert tokenizer.encode(text) == theirs.encode(text)


def test_ids_are_equal_on_real_text(tokenizer, theirs, text_path):
    for path in sorted(text_path.glob("*.txt"))[::25]:
        text = path.read_text(encoding="utf-8")
        assert tokenizer.encode(text) == theirs.encode(text)


def test_chats_are_equal(tokenizer, theirs):
    for messages in (
        [{"role": "user", "content": "Hi  there\n"}],
        [
            {"role": "system", "content": ""},
            {"role": "user", "content": "12 × 3?"},
            {"role": "assistant", "content": " 36"},
        ],
    ):
        for prompt in (True, False):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
            assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompt) == expected
