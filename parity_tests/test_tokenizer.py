"""Our tokenizer gives the same ids as transformers' AutoTokenizer on the folders that we export."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from transformers import AutoTokenizer

from smollm_jax.errors import InputFileError
from smollm_jax.tokenizer import Tokenizer
from tests.chat_templates import CONFIG, core_of_chats, write_chat_folder
from tests.tokenizer.test_tokenizer import TEXTS


@pytest.fixture(scope="module")
def both(source, exported):
    """Our tokenizer of the weights, and transformers' tokenizer of the exported folder."""
    return Tokenizer.load(source), AutoTokenizer.from_pretrained(exported)


@settings(max_examples=2000, deadline=None)
@given(text=TEXTS)
def test_ids_are_equal_on_any_text(both, text):
    """On 2,000 texts that can be encoded; transformers encodes a typed special token as one id."""
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


TEXTS_OF_FILES = [
    "the  heThe <think>the</think> 12  34\n56\n\n7 a<|im_end|>b </s>  <mask> x<mask>y",
    "  12\t\n3 é🙂\r\n",
    "",
    " ",
]


def added(content: str, i: int, **flags: bool) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": i, "content": content, **plain, **flags}


def processor(*single: str, **ids: int) -> dict[str, Any]:
    """A post-processor that adds these special tokens around the text `A`."""

    def piece(name: str) -> dict[str, Any]:
        return {"Sequence": {"id": "A", "type_id": 0}} if name == "A" else {"SpecialToken": {"id": name, "type_id": 0}}

    special = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items()}
    pair = [piece("A"), {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": list(map(piece, single)), "pair": pair, "special_tokens": special}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 64,
    "pad_id": 2, "pad_type_id": 0, "pad_token": "<|im_end|>",
}  # fmt: skip
BOS = {"type": "Sequence", "processors": [BYTE_LEVEL, processor("s", "A", s=3)]}
NUMBERS = (
    "(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": NUMBERS}, "behavior": "Isolated", "invert": False}
LATER = {**BYTE_LEVEL, "add_prefix_space": False, "use_regex": False}
NONE: dict[str, Any] = {"type": "Sequence", "normalizers": []}
JSONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "truncation and padding": {"truncation": TRUNCATION, "padding": PADDING},
    "padding to a length": {"padding": PADDING | {"strategy": {"Fixed": 9}, "direction": "Left"}},
    "no normalizers": {"normalizer": NONE},
    "a sequence of no normalizers": {"normalizer": NONE | {"normalizers": [NONE, NONE]}},
    "a post-processor of bytes": {"post_processor": BYTE_LEVEL},
    "BOS": {"post_processor": processor("s", "A", s=3)},
    "BOS after bytes": {"post_processor": BOS},
    "EOS": {"post_processor": processor("A", "e", e=4)},
    "three around": {"post_processor": processor("s", "s", "A", "e", s=3, e=4)},
    "RoBERTa's": {
        "post_processor": {
            "type": "RobertaProcessing", "sep": ["</s>", 4], "cls": ["<s>", 3],
            "trim_offsets": True, "add_prefix_space": False,
        }
    },
    "another pattern": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, LATER]}},
    "no post-processor key": {"post_processor": None},
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "merges as strings": {"merges": ["Ġ t", "h e", "Ġt he", "Ġ Ġ"]},
    "words before merges": {"ignore_merges": True, "merges": []},
    "an unknown token": {"unk_token": "<|endoftext|>"},
    "unknown tokens joined": {"unk_token": "<|endoftext|>", "fuse_unk": True},
    "bytes to fall back on": {"byte_fallback": True},
    "empty prefixes": {"continuing_subword_prefix": "", "end_of_word_suffix": ""},
    "no dropout": {"dropout": 0.0},
}
ADDED: dict[str, list[dict[str, Any]]] = {
    "special, taking the space before": [added("<mask>", 271, lstrip=True, special=True)],
    "special, taking both": [added("<mask>", 271, lstrip=True, rstrip=True, special=True)],
    "whole words": [added("<mask>", 271, single_word=True), added("he", 264, single_word=True, special=True)],
    "normalized": [added("<mask>", 271, normalized=True)],
    "one that begins another": [added("<ma", 271), added("<mask>", 272), added("<mask> x", 273, special=True)],
}


def assert_same_ids(path: Path) -> Tokenizer:
    ours, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    for text in TEXTS_OF_FILES:
        plain = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, parse_special=True) == plain
        assert ours.prefix_ids + plain + ours.suffix_ids == theirs(text)["input_ids"]
        assert ours.decode(plain) == theirs.decode(plain, clean_up_tokenization_spaces=False)
    assert len(theirs) == len(ours.core.get_vocab())
    return ours


@pytest.mark.parametrize("name", JSONS)
def test_ids_are_those_of_tokenizer_json_whatever_keys_stand_in_it(tmp_path, name):
    values = json.loads(core_of_chats().to_str()) | JSONS[name]
    ours = assert_same_ids(write_chat_folder(tmp_path / "t", CONFIG, **{"tokenizer.json": json.dumps(values)}))
    framed = ("BOS", "BOS after bytes", "EOS", "three around", "RoBERTa's")
    assert bool(ours.prefix_ids or ours.suffix_ids) == (name in framed)


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_the_model_whatever_keys_it_has(tmp_path, name):
    values = json.loads(core_of_chats().to_str())
    values["model"] |= MODELS[name]
    assert_same_ids(write_chat_folder(tmp_path / "t", CONFIG, **{"tokenizer.json": json.dumps(values)}))


@pytest.mark.parametrize("name", ADDED)
def test_ids_are_those_of_added_tokens_of_every_kind(tmp_path, name):
    values = json.loads(core_of_chats().to_str())
    values["added_tokens"] += ADDED[name]
    path = write_chat_folder(tmp_path / "t", CONFIG, **{"tokenizer.json": json.dumps(values)})
    ours = assert_same_ids(path)
    for text in TEXTS_OF_FILES:  # typed special tokens are text, and nothing beside them is lost
        assert ours.decode(ours.encode(text)) == text


def test_the_keys_that_transformers_itself_leaves_are_read(tmp_path):
    theirs = AutoTokenizer.from_pretrained(write_chat_folder(tmp_path / "t", CONFIG | {"pad_token": "</s>"}))
    theirs(["the", "the the the the"], truncation=True, padding=True, max_length=3)
    theirs.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/tokenizer.json").read_text())["truncation"]
    assert_same_ids(tmp_path / "saved")


def test_tokens_that_only_other_files_name_are_added(tmp_path):
    flags = added("<mask>", 0, lstrip=True, special=True)
    del flags["id"]
    decoder = {"271": flags, "272": {"content": "he", "special": False}, "0": {"content": "<|endoftext|>"}}
    with pytest.raises(
        InputFileError,
        match=r"tokenizer_config\.json: added token 'he' has id 272, but its id in the vocabulary is 264",
    ):
        Tokenizer.load(write_chat_folder(tmp_path / "a", CONFIG | {"added_tokens_decoder": decoder}))
    del decoder["272"]
    assert_same_ids(write_chat_folder(tmp_path / "b", CONFIG | {"added_tokens_decoder": decoder}))
    beside = json.dumps({"<mask>": 271, "<more>": 272})
    assert_same_ids(write_chat_folder(tmp_path / "c", CONFIG, **{"added_tokens.json": beside}))


def without_json(path: Path, merges: str | None = None) -> Path:
    """Replaces the folder's tokenizer.json by vocab.json and merges.txt."""
    model = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = "#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n"
    (path / "merges.txt").write_text(pairs if merges is None else merges, encoding="utf-8")
    return path


GPT2 = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"}
PIECES: dict[str, dict[str, Any]] = {
    "as GPT-2's": {},
    "the fast class": {"tokenizer_class": "GPT2TokenizerFast"},
    "BOS": {"add_bos_token": True, "bos_token": "<s>"},
    "BOS and EOS": {"add_bos_token": True, "add_eos_token": True},
    "BOS that is not asked for": {"add_bos_token": False},
    "added tokens": {
        "added_tokens_decoder": {"269": {"content": "<think>"}, "271": {"content": "<mask>", "special": True}}
    },
    "more special tokens": {"additional_special_tokens": ["<s>", "</s>"], "pad_token": "<pad>"},
}


@pytest.mark.parametrize("name", PIECES)
def test_a_vocabulary_and_merges_alone_are_read_as_gpt2s(tmp_path, name):
    """A merge of digits shows that the vocabulary was not trained with single digits."""
    core = json.loads(core_of_chats().to_str())
    core["model"]["vocab"] |= {"12": 267, "Ġ12": 268, "<think>": 269, "</think>": 270}
    core["model"]["merges"] += [["1", "2"], ["Ġ", "12"]]
    core["added_tokens"] = [token for token in core["added_tokens"] if token["special"]]
    path = write_chat_folder(tmp_path / "t", GPT2 | PIECES[name], **{"tokenizer.json": json.dumps(core)})
    assert_same_ids(without_json(path))


def test_smollm2s_vocabulary_and_merges_alone_give_smollm2s_ids(tmp_path, tokenizer, weights_path):
    """transformers 5 splits such a folder's text as GPT-2 does; the model was trained on single digits."""
    shutil.copy(weights_path / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text((weights_path / "tokenizer_config.json").read_text())
    ours = Tokenizer.load(without_json(tmp_path))
    for text in [*TEXTS_OF_FILES, "In  1861\n\n1. The 12th"]:
        assert ours.encode(text, parse_special=True) == tokenizer.encode(text, parse_special=True)
    special = {token.content for token in tokenizer.core.get_added_tokens_decoder().values()}
    assert {token.content for token in ours.core.get_added_tokens_decoder().values()} < special
