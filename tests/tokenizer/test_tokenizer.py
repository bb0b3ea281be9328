"""The tokenizer is SmolLM2's, is lossless, and encodes special tokens in a text as plain text."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.runtime.panics import silent_stderr
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.tokenizer.tokenizer import TextStream
from tests.small_files import small_tokenizer, tokenizer_folder


def test_known_ids(tokenizer):
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert tokenizer.vocab_size == 49_152
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert tokenizer.token_to_id("<empty_output>") == 16


def test_digits_are_split_one_by_one(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234567 x")] == [*"1234567", " x"]


def test_byte_count_is_that_of_the_text_without_special_tokens(tokenizer):
    for text in ("", "The capital", "naïve 👍🏽 1861\n\n", "<|im_end|> typed"):
        ids = tokenizer.encode(text)
        assert tokenizer.byte_count(ids) == len(text.encode())
        assert tokenizer.byte_count([0, *ids, 2]) == len(text.encode())


def test_eos_is_that_of_the_model(tokenizer, tokenizer_path):
    assert tokenizer.eos_token_id == 2
    base = Tokenizer.load(tokenizer_path)
    assert base.eos_token_id == 0
    assert base.chat_template is None


# Emoji with joiners, skin tones and flags, combining marks, right-to-left, NUL, typed special tokens, any character.
PARTS = [
    "<|im_end|>",
    "<|endoftext|>",
    "👩‍👩‍👧",
    "👍🏽",
    "🇨🇭",
    "e\u0301\u0323",
    "\u202eabc\u202c",
    "שלום",
    "\0",
    "\r\n",
    "123",
]
TEXTS = st.text() | st.lists(st.sampled_from(PARTS) | st.text(max_size=3)).map("".join)


@settings(max_examples=2000, deadline=None)
@given(text=TEXTS)
def test_a_text_is_decoded_unchanged_or_refused(tokenizer, text):
    if any(c in "\x04\x06\x13\x14\x16\x1d" or "\U00040000" <= c < "\U000c0000" for c in text):
        with pytest.raises(UsageError, match="has no token"):
            tokenizer.encode(text)
    else:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=500, deadline=None)
@given(text=TEXTS, ids=st.lists(st.integers(0, 49_151)), data=st.data())
def test_a_streamed_text_is_the_text_however_its_ids_are_split(tokenizer, text, ids, data):
    """Random ids are mostly incomplete characters; the ids of a text split emoji."""
    ids = ids if tokenizer.unencodable(text) else ids + tokenizer.encode(text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids))))
    stream = TextStream(tokenizer)
    pieces = [stream.add(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)] + [stream.end()]
    decoded = tokenizer.decode(ids)
    assert "".join(pieces) == decoded
    so_far = ""
    for piece in pieces:  # no piece is ever revised
        so_far += piece
        assert decoded.startswith(so_far)


def test_an_incomplete_character_is_held_back_until_it_is_complete_or_the_text_ends(tokenizer):
    ids = tokenizer.encode("a😀b")
    assert len(ids) > 4, "one token for an emoji: cut another character"
    stream = TextStream(tokenizer)
    assert [stream.add([i]) for i in ids] == ["a", *[""] * (len(ids) - 3), "😀", "b"]
    assert stream.end() == ""
    assert stream.add(ids[1:-2]) == ""
    assert stream.end() == "\ufffd"


def test_a_streamed_special_token_and_an_unknown_id_are_as_in_decode(tokenizer):
    for ids in ([1, 504, 2], [10**6, 504]):
        stream = TextStream(tokenizer)
        assert stream.add(ids) + stream.end() == tokenizer.decode(ids)


def test_the_vocabulary_reaches_to_the_largest_id(tmp_path):
    values = json.loads(small_tokenizer()["tokenizer.json"])
    values["model"]["vocab"]["Ġthe"] = 999
    folder = tokenizer_folder(tmp_path, **{"tokenizer.json": json.dumps(values).encode()})
    assert Tokenizer.load(folder).vocab_size == 1000
    assert len(values["model"]["vocab"]) == 260


def test_stderr_is_silent_only_inside_the_block(capfd):
    first, second = silent_stderr(), silent_stderr()  # of two threads
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    os.write(2, b"thread panicked\n")
    second.__exit__(None, None, None)
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"


@pytest.mark.parametrize(
    ("text", "named"), [("aé\x04b", r"2, U\+0004"), ("é\U00040000", r"1, U\+40000"), ("a\ud800", "surrogate")]
)
def test_a_character_without_a_token_is_an_error_that_names_it(tokenizer, text, named):
    with pytest.raises(UsageError, match=named):
        tokenizer.encode(text)


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.sampled_from(["<|im_end|>", "a<|endoftext|>b", "<file_sep>"]))
def test_typed_special_tokens_are_text_by_default(tokenizer, text):
    if tokenizer.unencodable(text) is None:
        assert all(i > 16 for i in tokenizer.encode(text))


def test_special_tokens_are_parsed_on_request(tokenizer):
    assert tokenizer.encode("<|im_start|>hi<|im_end|>", parse_special=True) == [1, *tokenizer.encode("hi"), 2]


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"model": {"type": "BPE"}}', '{"version": "1.0"'])
def test_a_malformed_tokenizer_is_refused_by_name(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputFileError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_that_panics_is_refused_by_name(tmp_path, weights_path):
    values = json.loads((weights_path / "tokenizer.json").read_text(encoding="utf-8"))
    values["added_tokens"][0]["id"] = 2**31  # tokenizers raises a PanicException or an error, by version
    values["model"]["merges"] = [["nowhere", "to"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(InputFileError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_regex_that_gives_up_on_a_text_is_refused_by_name(tmp_path, capfd):
    values = json.loads(small_tokenizer()["tokenizer.json"])
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    values["pre_tokenizer"]["pretokenizers"].insert(0, split)
    tokenizer = Tokenizer.load(tokenizer_folder(tmp_path, **{"tokenizer.json": json.dumps(values).encode()}))
    assert tokenizer.decode(tokenizer.encode("xxxy")) == "xxxy"
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(InputFileError, match=f"^{tmp_path}: the tokenizer cannot encode a text: .*retry-limit"):
            encode("x" * 30)
    assert capfd.readouterr().err == ""


def test_a_missing_tokenizer_says_where_to_get_one(tmp_path):
    with pytest.raises(InputFileError, match="fetch_assets"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["a"]])
def test_anything_but_text_is_refused_in_one_line(tokenizer, text):
    with pytest.raises(UsageError, match="a text must be a string, got"):
        tokenizer.encode(text)
    with pytest.raises(UsageError, match="texts must be a sequence of strings, not a string"):
        tokenizer.encode_batch("abc")


@pytest.mark.parametrize("ids", [5, None, "x", [1.5], [[5, 6]], [-1], [2**70]])
def test_anything_but_token_ids_is_refused_in_one_line(tokenizer, ids):
    with pytest.raises(UsageError, match="token ids must be a sequence of non-negative integers, got"):
        tokenizer.decode(ids)
