"""Our tokenizer gives the ids that transformers' AutoTokenizer gives from the folders we hand over."""

import pytest
from hypothesis import assume, given, settings
from transformers import AutoTokenizer

from smollm_jax.tokenizer import Tokenizer
from tests.test_tokenizer import TEXTS


@pytest.fixture(scope="module")
def both(source, exported):
    """Ours of the weights, and transformers' of what was written of them."""
    return Tokenizer.load(source), AutoTokenizer.from_pretrained(exported)


@settings(max_examples=2000, deadline=None)
@given(text=TEXTS)
def test_ids_are_equal_on_any_text(both, text):
    """2,000 texts that can be encoded; transformers reads a typed special token as one."""
    ours, theirs = both
    assume(ours.unencodable(text) is None)
    assert ours.encode(text, parse_special=True) == theirs.encode(text)


def test_ids_are_equal_on_real_text(both, text_path):
    ours, theirs = both
    for path in sorted(text_path.glob("*.txt"))[::25]:
        text = path.read_text(encoding="utf-8")
        assert ours.encode(text) == theirs.encode(text)


def test_chats_are_equal(tokenizer, instruct_export):
    theirs = AutoTokenizer.from_pretrained(instruct_export)
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
