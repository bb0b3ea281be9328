"""Chat templates give transformers' text and ids from the same folder, or an error where transformers raises one."""

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from smollm_jax.errors import UsageError
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.tokenizer.conversation import Conversation
from tests.chat_templates import CONFIG, CONVERSATIONS, OPTIONS, TEMPLATES, TOOLS, write_chat_folder


def both(folder: Path) -> tuple[Tokenizer, Any]:
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


def assert_equal(ours: Tokenizer, theirs: Any, messages: list[Any], options: dict[str, Any]) -> bool:
    """Asserts that text and ids are equal, or that both raise; returns whether there was a text."""
    named = {("chat_template" if name == "template" else name): value for name, value in options.items()}
    named.setdefault("add_generation_prompt", not options.get("continue_final_message"))
    try:
        text = theirs.apply_chat_template(messages, tokenize=False, **named)
    except Exception:  # whatever the template raises
        with pytest.raises(UsageError) as raised:
            ours.apply_chat_template(messages, **options)
        assert str(raised.value).isprintable(), "not one line"
        return False
    assert ours.decode(ours.apply_chat_template(messages, **options)) == text
    expected = theirs.apply_chat_template(messages, **named)["input_ids"]
    assert ours.apply_chat_template(messages, **options) == expected
    return True


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_conversation_is_as_transformers_renders_it(tmp_path, name):
    ours, theirs = both(write_chat_folder(tmp_path / "t", CONFIG, **{"chat_template.jinja": TEMPLATES[name]}))
    rendered = [
        assert_equal(ours, theirs, messages, options)
        for messages in CONVERSATIONS.values()
        for options in OPTIONS.values()
    ]
    assert any(rendered) != (name in ("what a sandbox forbids", "what no template has", "a namespace of secrets"))


TYPED = {
    "typed special tokens": [
        {"role": "user", "content": "a<|im_end|>\n<s>b </s>"},
        {"role": "assistant", "content": "<s>x"},
    ],
    "a typed one alone": [{"role": "user", "content": "<|im_end|>"}],
    "the beginning of one": [{"role": "user", "content": "1 <"}, {"role": "assistant", "content": "<|im_ "}],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_transformers_even_where_a_special_token_is_typed(tmp_path, name):
    ours, theirs = both(write_chat_folder(tmp_path / "t", CONFIG, **{"chat_template.jinja": TEMPLATES[name]}))
    for messages in TYPED.values():
        try:
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # whatever the template raises
            continue
        assert ours.decode(ours.apply_chat_template(messages)) == text


NAMED = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ tools | tojson }}", "rag": "R"}
AS_A_LIST = [{"name": name, "template": template} for name, template in NAMED.items()]
PLACES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "a string in the config": ({"chat_template": "C"}, {}),
    "a list in the config": ({"chat_template": AS_A_LIST}, {}),
    "an object in the config": ({"chat_template": NAMED}, {}),
    "a list without a default": ({"chat_template": AS_A_LIST[1:]}, {}),
    "a file and a string": ({"chat_template": "C"}, {"chat_template.jinja": "F\n"}),
    "a file and a list": ({"chat_template": AS_A_LIST}, {"chat_template.jinja": "F"}),
    "named files alone": ({}, {"additional_chat_templates/rag.jinja": "A"}),
    "named files and a string": ({"chat_template": "C"}, {"additional_chat_templates/rag.jinja": "A"}),
    "named files and a file": (
        {"chat_template": "C"},
        {"additional_chat_templates/tool_use.jinja": "A", "chat_template.jinja": "F"},
    ),
    "a file called default among the named": ({}, {"additional_chat_templates/default.jinja": "A"}),
    "both defaults": ({}, {"additional_chat_templates/default.jinja": "A", "chat_template.jinja": "F"}),
    "a processor's file beside a string": ({"chat_template": "C"}, {"chat_template.json": '{"chat_template": "P"}'}),
    "none": ({}, {}),
    "null": ({"chat_template": None}, {}),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_template_taken_is_the_one_that_transformers_takes(tmp_path, place):
    config, files = PLACES[place]
    ours, theirs = both(write_chat_folder(tmp_path / "t", CONFIG | config, **files))
    for options in ({}, {"tools": TOOLS}, {"tools": []}, {"template": "{{ eos_token }}!"}, {"template": "rag"}):
        if options.get("template") == "rag" and "rag" not in ours.templates.sources:
            continue  # transformers would take the name itself for a template
        assert_equal(ours, theirs, [{"role": "user", "content": "Hi"}], options)


def test_a_name_that_no_template_has_is_refused_with_the_names_there_are(tmp_path):
    ours = Tokenizer.load(write_chat_folder(tmp_path / "t", {"chat_template": AS_A_LIST}))
    with pytest.raises(UsageError, match="no chat template 'tool-use', only 'default', 'rag', 'tool_use'"):
        ours.apply_chat_template([{"role": "user", "content": "Hi"}], template="tool-use")


def test_a_processors_template_counts_where_there_is_no_other(tmp_path):
    path = write_chat_folder(
        tmp_path / "t", {}, **{"chat_template.json": '{"chat_template": "P{{ messages[0].role }}"}'}
    )
    assert Tokenizer.load(path).decode(Tokenizer.load(path).apply_chat_template([{"role": "user"}])) == "Puser"


CONTINUED: dict[str, list[Any]] = {
    "a text": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,  "}],
    "parts": [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]}],
    "an image": [{"role": "assistant", "content": [{"type": "image", "image": "x"}]}],
    "a thought": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x", "thinking": "hm"}],
    "nothing": [{"role": "assistant", "content": ""}],
    "no content": [{"role": "assistant"}],
}


@pytest.mark.parametrize(
    "name", ["ChatML", "ChatML, joined", "alternating", "no system", "parts", "documents", "macros"]
)
def test_a_last_message_is_continued_as_in_transformers(tmp_path, name):
    ours, theirs = both(write_chat_folder(tmp_path / "t", CONFIG, **{"chat_template.jinja": TEMPLATES[name]}))
    ways = (True, "content", "reasoning_content", "thinking", "nowhere")
    filled = [
        assert_equal(ours, theirs, messages, {"continue_final_message": way})
        for messages in CONTINUED.values() for way in ways
    ]  # fmt: skip
    assert any(filled)


ROLES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "strings": ({"bos_token": "<s>", "eos_token": "</s>"}, None),
    "objects": (CONFIG, None),
    "null": ({"bos_token": None, "eos_token": "</s>"}, {"eos_token": None}),
    "only in the map": ({}, {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False, "rstrip": False}}),
    "another in the map": ({"eos_token": "<|im_end|>"}, {"eos_token": "</s>", "pad_token": "</s>"}),
    "the map not read": ({"eos_token": "<|im_end|>", "added_tokens_decoder": {}}, {"eos_token": "</s>"}),
    "names of the model's own": ({"image_token": "<image>", "eos_token": "</s>"}, {"boi_token": "<boi>"}),
    "an object of more": ({"extra_special_tokens": {"video_token": "<video>"}, "eos_token": "</s>"}, None),
    "a list of more": ({"extra_special_tokens": ["<a>", "<b>"], "eos_token": "</s>"}, None),
    "a list by the old name": ({"additional_special_tokens": ["<a>", "<|im_end|>"], "eos_token": "</s>"}, None),
    "a list in the map": ({}, {"additional_special_tokens": ["<a>", "<b>"], "eos_token": "</s>"}),
    "no vocabulary has it": ({"pad_token": "[PAD]", "eos_token": "</s>"}, None),
}
VARIABLES = "{{ [bos_token, eos_token, unk_token, pad_token, image_token, boi_token, video_token] }}"


@pytest.mark.parametrize("where", ROLES)
def test_special_tokens_are_strings_and_tokens_as_in_transformers(tmp_path, where):
    config, in_map = ROLES[where]
    files = {"chat_template.jinja": VARIABLES} | ({"special_tokens_map.json": json.dumps(in_map)} if in_map else {})
    ours, theirs = both(write_chat_folder(tmp_path / "t", config, **files))
    assert ours.roles == theirs.special_tokens_map
    assert_equal(ours, theirs, [{"role": "user", "content": "Hi"}], {})
    text = "the <a> <b><image>[PAD] <boi><video></s> the"
    assert ours.encode(text, parse_special=True) == theirs.encode(text, add_special_tokens=False)


def test_pydantic_models_dataclasses_and_numbers_of_numpy_are_read_as_transformers_reads_them(tmp_path):
    class Role(enum.StrEnum):
        USER = "user"

    @dataclasses.dataclass
    class Part:
        type: str
        text: str

    class Call:
        def model_dump(self) -> dict[str, Any]:
            return {"name": "add", "at": np.int64(3)}

    messages = [{"role": Role.USER, "content": [Part("text", "Hi")], "call": Call(), "yes": np.bool_(False)}]
    ours, theirs = both(write_chat_folder(tmp_path / "t", CONFIG, **{"chat_template.jinja": "{{ messages | tojson }}"}))
    assert assert_equal(ours, theirs, messages, {})


def test_the_text_itself_is_had_too(tmp_path):
    ours, theirs = both(write_chat_folder(tmp_path / "t", CONFIG, **{"chat_template.jinja": TEMPLATES["ChatML"]}))
    messages = [{"role": "user", "content": "a<|im_end|>b"}]
    rendered = ours.templates.render(Conversation(messages), ours.roles)
    assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
