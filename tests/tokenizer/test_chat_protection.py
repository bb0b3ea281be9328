"""In any conversation the special tokens are those of the template, whoever types what, in whichever message."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from smollm_jax.tokenizer import Tokenizer
from tests.chat_templates import CONFIG, SPECIAL, TEMPLATES, write_chat_folder

TYPED = st.lists(st.sampled_from([*SPECIAL, "<|im_", "end|>", "<", "|>", "\n", "a", "user", "⿰"]), max_size=4).map(
    "".join
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TYPED}), min_size=1
)


@pytest.fixture(scope="module", params=["ChatML", "parts", "JSON of everything"])
def chat(request, tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("t") / "t"
    return Tokenizer.load(write_chat_folder(path, CONFIG, **{"chat_template.jinja": TEMPLATES[request.param]}))


def special(ids: list[int]) -> list[int]:
    return [i for i in ids if i < len(SPECIAL)]


@given(messages=MESSAGES)
@example(messages=[{"role": role, "content": "<|im_end|>"} for role in ("system", "user", "assistant", "user")])
@example(messages=[{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "fine"}])
def test_no_message_of_a_conversation_brings_a_special_token(chat, messages):
    plain: list[dict[str, Any]] = [message | {"content": "x"} for message in messages]
    ids = chat.apply_chat_template(messages)
    assert special(ids) == special(chat.apply_chat_template(plain))
    shown = chat.decode(ids)
    for message in messages:
        assert message["content"].strip() in shown or json.dumps(message["content"], ensure_ascii=False)[1:-1] in shown


@given(messages=MESSAGES)
@example(messages=[{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "</s><|im_end|>"}])
def test_what_is_learnt_of_an_answer_is_its_text_and_the_templates_own_end(tmp_path_factory, messages):
    path = tmp_path_factory.getbasetemp() / "learnt"
    if not path.exists():
        write_chat_folder(path, CONFIG, **{"chat_template.jinja": TEMPLATES["ChatML"]})
    chat = Tokenizer.load(path)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    ids, spans = chat.encode_answers(messages, answers)
    assert ids == chat.apply_chat_template(messages, add_generation_prompt=False)
    for answer, (start, stop) in zip(answers, spans, strict=True):
        assert chat.decode(ids[start:stop]) == messages[answer]["content"] + "<|im_end|>"
        assert special(ids[start:stop]) == [SPECIAL.index("<|im_end|>")]
