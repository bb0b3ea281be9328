"""Malformed tokenizers and chat templates."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile_texts import MIB, Writer, sparse
from tests.hostile_weights import Cases
from tests.small_files import small_tokenizer, tokenizer_folder


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Writer:
    """A tokenizer folder whose tokenizer.json `change` edits in place or replaces by its return value."""

    def write(folder: Path) -> Path:
        values = json.loads(small_tokenizer()["tokenizer.json"])
        new = change(values)
        content = new if isinstance(new, bytes) else json.dumps(values).encode()
        return tokenizer_folder(folder / "t", **{"tokenizer.json": content})

    return write


def top(**changed: Any) -> Writer:
    return tokenizer(lambda values: values.update(changed))


def model(**changed: Any) -> Writer:
    return tokenizer(lambda values: values["model"].update(changed))


def added(**changed: Any) -> Writer:
    return tokenizer(lambda values: values["added_tokens"][0].update(changed))


def is_(content: bytes) -> Writer:
    return tokenizer(lambda values: content)


def two_of_one_id(values: dict[str, Any]) -> None:
    values["model"]["vocab"]["Ġthe"] = values["model"]["vocab"]["he"]


def mapping(content: bytes) -> Writer:
    """A normalizer that `tokenizers` parses from a byte table."""
    return top(normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()})


def processor(first: dict[str, Any], i: int = 0) -> dict[str, Any]:
    """A post-processor that adds a prefix to the text."""
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [i], "tokens": ["<|endoftext|>"]}},
    }


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
UNREADABLE = "not a readable tokenizer"
NORMALIZER = r"normalizer is \{"
TOKENIZER: Cases = {
    "empty": (is_(b""), "not readable as JSON"),
    "cut": (is_(b'{"version": "1.0"'), "not readable as JSON: .* line 1"),
    "an empty object": (is_(b"{}"), UNREADABLE),
    "a list": (is_(b"[]"), UNREADABLE),
    "null": (is_(b"null"), UNREADABLE),
    "not UTF-8": (is_(b'{"version": "\xff"}'), "byte 13 is not UTF-8"),
    "a byte order mark": (tokenizer(lambda v: b"\xef\xbb\xbf" + json.dumps(v).encode()), "byte order mark"),
    "UTF-16": (tokenizer(lambda v: json.dumps(v).encode("utf-16-le")), "looks like UTF-16"),
    "a key twice": (is_(b'{"version": "1.0", "version": "1.0"}'), "key 'version' occurs twice"),
    "nested too deeply": (is_(b'{"a":' * 100_000), "nested too deeply"),
    "33 MiB": (lambda folder: sparse("tokenizer.json", 33 * MIB)(folder).parent, "too large: .* bytes, at most"),
    "another version": (top(version="2.0"), UNREADABLE),
    "no model": (tokenizer(lambda v: v.pop("model") and None), UNREADABLE),
    "an unknown model": (model(type="Nope"), "not a byte-level"),
    "a model of words": (top(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "not a byte-level"),
    "a model of pieces": (top(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0]]}), "not a byte-level"),
    "a model of words that does not say so": (top(model={"vocab": {"a": 0}, "unk_token": "a"}), "not a byte-level"),
    "an unknown piece beyond all": (
        top(model={"type": "Unigram", "unk_id": 9, "vocab": [["a", 0]]}),
        "not a byte-level",
    ),
    "a vocabulary in a list": (model(vocab=["a"]), UNREADABLE),
    "an id below 0": (model(vocab={"a": -1}), UNREADABLE),
    "an id that is a fraction": (model(vocab={"a": 1.5}), UNREADABLE),
    "an id of 10,000 digits": (is_(b'{"model": {"vocab": {"abc": 1' + b"0" * 10_000 + b"}}}"), "key 'abc'"),
    "an id that is NaN": (is_(b'{"model": {"vocab": {"abc": NaN}}}'), "key 'abc'"),
    "no entry": (model(vocab={}), UNREADABLE),
    "two entries of one id": (tokenizer(two_of_one_id), "model.vocab has two entries with the same id"),
    "a merge of unknown tokens": (model(merges=[["no", "where"]]), f"{UNREADABLE}.*out of vocabulary"),
    "a merge of one": (model(merges=["a"]), UNREADABLE),
    "a merge of three": (model(merges=[["h", "e", "e"]]), UNREADABLE),
    "merges in a string": (model(merges="h e"), UNREADABLE),
    "a prefix (panics)": (model(continuing_subword_prefix="x" * 50), "model.continuing_subword_prefix is 'xx"),
    "a suffix": (model(end_of_word_suffix="</w>"), "model.end_of_word_suffix is '</w>'"),
    "dropout": (model(dropout=0.5), "model.dropout is 0.5"),
    "dropout of 2": (model(dropout=2.0), "model.dropout is 2.0"),
    "no table (panics)": (mapping(b""), NORMALIZER),
    "a table too short (panics)": (mapping(b"\0\0\0"), NORMALIZER),
    "a table of 4 GiB (aborts)": (mapping(b"\xff\xff\xff\xff"), NORMALIZER),
    "small letters": (top(normalizer={"type": "Lowercase"}), "normalizer is {'type': 'Lowercase'}"),
    "a normalizer's pattern": (
        top(normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}),
        NORMALIZER,
    ),
    "an unknown pre-tokenizer": (top(pre_tokenizer={"type": "Nope"}), UNREADABLE),
    "a pattern": (top(pre_tokenizer=SPLIT | {"pattern": {"Regex": "("}}), UNREADABLE),
    "pieces of 0 characters (panics)": (
        top(pre_tokenizer={"type": "FixedLength", "length": 0}),
        f"{UNREADABLE}: chunk",
    ),
    "words cut at spaces": (top(pre_tokenizer={"type": "WhitespaceSplit"}), "does not decode to the text"),
    "a space put first": (
        top(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}),
        "does not decode to the text",
    ),
    "no decoder": (top(decoder=None), "not a byte-level"),
    "an unknown decoder": (top(decoder={"type": "Nope"}), "not a byte-level"),
    "truncation that is no object": (top(truncation=99), UNREADABLE),
    "padding to no length": (top(padding={"strategy": {"Fixed": -1}}), UNREADABLE),
    "a post-processor that doubles the text": (
        top(post_processor=processor({"Sequence": {"id": "A", "type_id": 0}})),
        "does not decode to the text",
    ),
    "a post-processor that adds an id of no token": (
        top(post_processor=processor({"SpecialToken": {"id": "<s>", "type_id": 0}}, 999)),
        "post_processor adds id 999",
    ),
    "a post-processor that adds an unknown token": (
        top(post_processor=processor({"SpecialToken": {"id": "<t>", "type_id": 0}})),
        UNREADABLE,
    ),
    "a normalizer in two sequences": (
        top(normalizer={"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [{"type": "NFC"}]}]}),
        NORMALIZER,
    ),
    "an added token of id 2**31": (added(id=2**31), "added token '<|endoftext|>' has id 2147483648"),
    "an added token of id 2**32": (added(id=2**32), UNREADABLE),
    "an added token without text": (added(content=""), "added token '' is empty"),
    "an added token that is not special and strips": (
        added(rstrip=True, special=False),
        "added token '<|endoftext|>' strips",
    ),
    "an added token that is a number": (top(added_tokens=[3]), UNREADABLE),
}


def beside(name: str, content: object, **more: bytes) -> Writer:
    """A tokenizer folder with another `tokenizer_config.json` or `chat_template.jinja`."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: tokenizer_folder(folder / "t", **{name: content}, **more)


def settings(**values: Any) -> Writer:
    return beside("tokenizer_config.json", values)


TOKENIZER_CONFIG: Cases = {
    "a list": (beside("tokenizer_config.json", [1]), "not a JSON object"),
    "no JSON": (beside("tokenizer_config.json", b"{"), "not readable as JSON"),
    "a byte order mark": (beside("tokenizer_config.json", b"\xef\xbb\xbf{}"), "byte order mark"),
    "a key twice": (beside("tokenizer_config.json", b'{"a": 1, "a": 1}'), "key 'a' occurs twice"),
    "eos a number": (settings(eos_token=2), "eos_token must be a string, got 2"),
    "eos false": (settings(eos_token=False), "eos_token must be a string, got False"),
    "eos a list": (settings(eos_token=["a"]), "eos_token must be a string"),
    "eos an empty object": (settings(eos_token={}), "eos_token must be a string"),
    "eos an object with a number": (settings(eos_token={"content": 2}), "eos_token must be a string"),
    "eos of no id": (settings(eos_token="</s>", added_tokens_decoder={}), "eos_token '</s>' is not in the vocabulary"),
    "pad a number": (settings(pad_token=0), "pad_token must be a string, got 0"),
    "added tokens in a list": (settings(added_tokens_decoder=[1]), "added_tokens_decoder must be an object of objects"),
    "an added token that is text": (settings(added_tokens_decoder={"260": "<x>"}), "must be an object of objects"),
    "an added token of a flag more": (
        settings(added_tokens_decoder={"260": {"content": "<x>", "bold": True}}),
        "added_tokens_decoder '260' has the unknown key 'bold'",
    ),
    "an added token of another id": (
        settings(added_tokens_decoder={"999": {"content": "<x>"}}),
        "added token '<x>' has id 999, but its id in the vocabulary is 260",
    ),
    "an added token of 10,000 digits": (settings(added_tokens_decoder={"1" * 10_000: {"content": "<x>"}}), "has id -1"),
    "an added token of no id": (settings(added_tokens_decoder={"x": {"content": "<x>"}}), "has id -1"),
    "an added token that strips": (
        settings(added_tokens_decoder={"260": {"content": "<x>", "lstrip": True}}),
        "added token '<x>' strips",
    ),
    "added tokens beside, in a list": (beside("added_tokens.json", [1]), r"added_tokens\.json: not a JSON object"),
    "an added token beside, of another id": (beside("added_tokens.json", {"<x>": 7}), r"added_tokens\.json: .* id 7"),
    "an added token beside, of no id": (beside("added_tokens.json", {"<x>": "a"}), r"added_tokens\.json: .* id 'a'"),
    "a map of roles, no JSON": (beside("special_tokens_map.json", b"{"), r"special_tokens_map\.json: not readable"),
    "a role in the map that is a number": (
        beside("special_tokens_map.json", {"bos_token": 3}),
        r"special_tokens_map\.json: bos_token must be a string, got 3",
    ),
}


def pieces(**changed: object) -> Writer:
    """A folder with vocab.json and merges.txt instead of tokenizer.json."""

    def write(folder: Path) -> Path:
        path = tokenizer_folder(folder / "t")
        core = json.loads((path / "tokenizer.json").read_text())["model"]
        (path / "tokenizer.json").unlink()
        files = {"vocab.json": core["vocab"], "merges.txt": "\n".join(map(" ".join, core["merges"]))}
        for name, content in (files | changed).items():
            text = content if isinstance(content, str) else json.dumps(content)
            (path / name).write_text(text, encoding="utf-8")
        return path

    return write


VOCABULARY: Cases = {
    "a list": (pieces(**{"vocab.json": ["a"]}), r"vocab\.json: not a JSON object"),
    "an id below 0": (pieces(**{"vocab.json": {"a": -1}, "merges.txt": ""}), UNREADABLE),
    "an id in words": (pieces(**{"vocab.json": {"a": "0"}, "merges.txt": ""}), UNREADABLE),
    "two entries of one id": (
        pieces(**{"vocab.json": {"a": 0, "b": 0}}),
        r"vocab\.json: has two entries with the same id",
    ),
    "no entry": (pieces(**{"vocab.json": {}, "merges.txt": ""}), r"tokenizer_config\.json: eos_token"),
    "a merge of one": (pieces(**{"merges.txt": "#version: 0.2\nh\n"}), r"merges\.txt, line 2: 'h' does not join"),
    "a merge of three": (pieces(**{"merges.txt": "h e e"}), r"merges\.txt, line 1: 'h e e' does not join"),
    "a merge of unknown tokens": (
        pieces(**{"merges.txt": "no where"}),
        "'no where' does not join two entries of vocab",
    ),
    "a merge to an unknown token": (pieces(**{"merges.txt": "a b"}), "'a b' does not join two entries of vocab"),
    "another class": (
        pieces(**{"tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer"}}),
        "tokenizer_class 'CLIPTokenizer' is not supported with vocab.json",
    ),
    "a space put first": (
        pieces(**{"tokenizer_config.json": {"add_prefix_space": True}}),
        "add_prefix_space is not supported",
    ),
}
TEMPLATE: Cases = {
    "a template in a list without a name": (
        settings(chat_template=[{"template": "b"}]),
        "chat_template must be a string",
    ),
    "a template in a list that is a number": (
        settings(chat_template=[{"name": "default", "template": 3}]),
        "chat_template must be a string.*got 3",
    ),
    "a template that is a number": (settings(chat_template=3), "chat_template must be a string.*got 3"),
    "a template with a fault": (settings(chat_template="a\n{% for %}"), "chat_template, line 2"),
    "a template that does not end": (settings(chat_template="{% if a %}"), "chat_template, line 1"),
    "a template with loops 50 deep": (
        settings(chat_template="{% for a in b %}" * 50 + "{% endfor %}" * 50),
        "template",
    ),
    "a template with 9,999 brackets": (settings(chat_template="{{" + "(" * 9999 + ")" * 9999 + "}}"), "chat_template"),
    "a template of 1 MiB": (settings(chat_template="a" * MIB), "at most 65,536 characters"),
    "a template of its own with a fault": (beside("chat_template.jinja", b"{{"), r"jinja: chat_template, line 1"),
    "a template of its own, not UTF-8": (beside("chat_template.jinja", b"a\xff"), r"jinja: byte 1 is not UTF-8"),
    "a template beside, not UTF-8": (
        beside("chat_template.jinja", b"a\xff"),
        r"chat_template\.jinja: byte 1 is not UTF-8",
    ),
    "a template of a processor that is no JSON": (
        beside("chat_template.json", b"{", **{"tokenizer_config.json": b"{}"}),
        r"chat_template\.json: not readable as JSON",
    ),
    "a template with a generation that does not end": (
        settings(chat_template="{% generation %}"),
        "chat_template, line 1",
    ),
    "a template that breaks out of nothing": (
        settings(chat_template="{% break %}"),
        "chat_template.*'break' outside loop",
    ),
}
