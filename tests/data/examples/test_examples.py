"""Rows become token ids of which the answers are learnt; an invalid row gives a one-line error that names it."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from smollm_jax.data.examples.examples import Example, read_examples, read_pairs
from smollm_jax.data.examples.packing import best_fit, packed, padded
from smollm_jax.data.examples.show import mask_of
from smollm_jax.errors import InputFileError, SmolLMError, UsageError
from smollm_jax.tokenizer import Tokenizer
from tests.hostile_data import zst

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CHAT = {"messages": [USER, ANSWER]}


def written(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def learnt(example: Example, tokenizer: Tokenizer) -> list[str]:
    """The text of each consecutive range of learnt tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], example.learnt, [0]))))
    return [tokenizer.decode(example.ids[start:stop].tolist()) for start, stop in edges.reshape(-1, 2)]


ROWS = {  # what a row is: the row, what is learnt of it as an answer, and as a completion
    "messages": (CHAT, ["Hello<|im_end|>"], ["Hello<|im_end|>\n"]),
    "two turns": (
        {"messages": [USER, ANSWER, USER, {"role": "assistant", "content": ""}]},
        ["Hello<|im_end|>", "<|im_end|>"],
        ["<|im_end|>\n"],
    ),
    "the assistant begins": ({"messages": [ANSWER, USER, ANSWER]}, ["Hello<|im_end|>"] * 2, ["Hello<|im_end|>\n"]),
    "OpenAI's weight": (
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]},
        ["Hello<|im_end|>"],
        ["Hello<|im_end|>\n"],
    ),
    "parts of text": (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": t} for t in ("Hel", "lo")]}]},
        ["Hello<|im_end|>"],
        ["Hello<|im_end|>\n"],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        ["Hello<|im_end|>"],
        ["Hello<|im_end|>\n"],
    ),
    "prompt and completion": ({"prompt": [USER], "completion": [ANSWER]}, ["Hello<|im_end|>"], ["Hello<|im_end|>\n"]),
    "an answer in the prompt": (
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
        ["Hello<|im_end|>"],
        ["Hello<|im_end|>\n"],
    ),
    "text and text": ({"prompt": "The sky is", "completion": " blue"}, [" blue<|im_end|>"], [" blue<|im_end|>"]),
    "Alpaca": (
        {"instruction": "Add", "input": "1 2", "output": "3"},
        ["3<|im_end|>"],
        ["3<|im_end|>\n"],
    ),
    "Dolly": ({"instruction": "Add", "context": "", "response": "3"}, ["3<|im_end|>"], ["3<|im_end|>\n"]),
    "text": ({"text": "Once."}, ["Once.<|im_end|>"], None),
    "a text that is ended": ({"text": "Once.<|im_end|>"}, ["Once.<|im_end|>"], None),
    "a special token as text": (
        {"messages": [USER, {"role": "assistant", "content": "a<|im_end|>b"}]},
        ["a<|im_end|>b<|im_end|>"],
        ["a<|im_end|>b<|im_end|>\n"],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_is_learnt_of_a_row(tokenizer, tmp_path, name):
    row, answers, completion = ROWS[name]
    file = written(tmp_path, row)
    [example], report = read_examples([file], tokenizer)
    assert learnt(example, tokenizer) == answers
    assert report.learnt == example.learnt[1:].sum()
    [everything], _ = read_examples([file], tokenizer, learn="all")
    assert everything.ids.tolist() == example.ids.tolist()
    assert everything.learnt.all()
    if completion is not None:
        [example], _ = read_examples([file], tokenizer, learn="completion")
        assert learnt(example, tokenizer) == completion
    else:
        with pytest.raises(UsageError, match="no completion"):
            read_examples([file], tokenizer, learn="completion")


def test_the_ids_are_those_of_a_chat(tokenizer, tmp_path):
    messages = [
        {"role": "system", "content": "é <|im_end|>"},
        USER,
        ANSWER,
        USER,
        {"role": "assistant", "content": "\n"},
    ]
    [example], _ = read_examples([written(tmp_path, {"messages": messages})], tokenizer)
    assert example.ids.tolist() == tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert example.ids.dtype == np.int32


def test_every_kind_of_file_has_the_same_rows(tokenizer, tmp_path):
    rows = [CHAT, {"messages": [USER, {"role": "assistant", "content": "é"}]}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = pyarrow.table({"messages": [row["messages"] for row in rows]})
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zst(lines))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name, new in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    expected = [example.ids.tolist() for example in read_examples([tmp_path / "a.jsonl"], tokenizer)[0]]
    files = sorted(tmp_path.iterdir())
    for file in files:
        assert [e.ids.tolist() for e in read_examples([file], tokenizer)[0]] == expected, file.name
    examples, report = read_examples([tmp_path], tokenizer)
    assert (len(examples), report.files) == (2 * len(files), len(files))


def test_a_table_of_text(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text('instruction,output\nAdd,"3\n4"\n')
    [example], report = read_examples([tmp_path / "a.csv"], tokenizer)
    assert learnt(example, tokenizer) == ["3\n4<|im_end|>"]
    assert report.lines()[0] == "read 1 instruction from 1 file"


def chat(*messages: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


NAME = "rows.jsonl: line 2"
FAULTS = {  # what is wrong: the row, what is said
    "other columns": ({"question": "a", "answer": "b"}, f"{NAME} has columns question, answer: needed are messages;"),
    "no object": ([1], f"{NAME} is no JSON object but"),
    "a prompt alone": ({"prompt": "a"}, f"{NAME} has a prompt but no completion"),
    "another kind": ({"text": "a"}, f"{NAME} is a text, the rows before it are chats: "),
    "no list": ({"messages": "a"}, f"{NAME}: messages must be a list of messages, got 'a'"),
    "an empty list": ({"messages": []}, f"{NAME}: messages must be a list of messages"),
    "a string in it": ({"messages": ["a"]}, f"{NAME}: messages: message 1 must be an object with role and content"),
    "a misspelt role": (
        chat(("user", "a"), ("asistant", "b")),
        "message 2: role is 'asistant': did you mean 'assistant'",
    ),
    "a strange role": (chat(("narrator", "a")), "message 1: role is 'narrator': known are system, developer, user"),
    "swapped keys": (chat(("Hi there", "user")), "message 1: role is 'Hi there' and content 'user': are they swapped"),
    "no role": ({"messages": [{"content": "a"}]}, "message 1: has no role"),
    "no content": ({"messages": [{"role": "user"}]}, "message 1: content must be a text, got None"),
    "a number": (chat(("user", 1)), "message 1: content must be a text, got 1"),
    "an image": (chat(("user", [{"type": "image"}])), "message 1: content must be a text, got"),
    "half a weight": (
        {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
        "message 1: weight must be 0 or 1, got 0.5",
    ),
    "NUL": (chat(("user", "a\0")), "message 1: character 1 is NUL"),
    "no such character": (chat(("user", "\ud800")), "message 1 cannot be encoded: character 0 is a lone surrogate"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_row_that_does_not_fit_is_named(tokenizer, tmp_path, name):
    row, said = FAULTS[name]
    with pytest.raises(InputFileError, match=said) as raised:
        read_examples([written(tmp_path, CHAT, row)], tokenizer)
    assert str(raised.value).isprintable(), "not one line"
    assert str(raised.value).startswith(str(tmp_path))


SWAPPED = {
    "both": ({"prompt": [ANSWER], "completion": [USER]}, "prompt ends with a message of the assistant: .*swapped"),
    "the answer": (
        {"prompt": [USER], "completion": [USER]},
        "completion begins with a message of role 'user': .*swapped",
    ),
    "text and messages": ({"prompt": "a", "completion": [ANSWER]}, "prompt and completion must both be texts, or both"),
    "preferences": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "has chosen and rejected: preference pairs are learnt with --method dpo",
    ),
    "empty": ({"prompt": [USER], "completion": []}, "completion must be a list of messages"),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_columns_that_are_swapped_or_do_not_fit_are_named(tokenizer, tmp_path, name):
    row, said = SWAPPED[name]
    with pytest.raises(InputFileError, match=f"line 1:? {said}"):
        read_examples([written(tmp_path, row)], tokenizer)


def test_files_that_are_none_of_rows(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(InputFileError, match=r"a\.txt: is plain text, not rows"):
        read_examples([tmp_path / "a.txt"], tokenizer)
    with pytest.raises(InputFileError, match=r"b\.jsonl: no such file or folder"):
        read_examples([tmp_path / "b.jsonl"], tokenizer)
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(InputFileError, match=r"c\.jsonl: nothing to learn in 0 rows"):
        read_examples([tmp_path / "c.jsonl"], tokenizer)
    (tmp_path / "d.csv").write_text("text,text\na,b\n")
    with pytest.raises(InputFileError, match=r"d\.csv: line 1: two columns of the header have the same name"):
        read_examples([tmp_path / "d.csv"], tokenizer)


def test_rows_of_which_nothing_is_learnt_are_counted_and_said(tokenizer, tmp_path):
    long = {"messages": [{"role": "user", "content": "word " * 50}, ANSWER]}
    cut = {"messages": [USER, {"role": "assistant", "content": "word " * 50}]}
    file = written(tmp_path, CHAT, {"messages": [USER]}, long, cut)
    examples, report = read_examples([file], tokenizer, max_length=48)
    assert (len(examples), report.unlearnt, report.filled, report.truncated) == (2, 1, 1, 1)
    assert len(examples[1].ids) == 48
    lines = report.lines()
    assert lines[0] == "read 4 chats from 1 file"
    assert any(line.startswith("1 row longer than 48 tokens: the last ") for line in lines)
    assert "left out 1 row: the prompt alone fills 48 tokens" in lines
    assert "left out 1 row: no token of them is to be learnt" in lines
    with pytest.raises(InputFileError, match=r"nothing to learn in 1 row: left out 1 row: no token"):
        read_examples([written(tmp_path, {"messages": [USER]})], tokenizer)


def test_bad_text_is_skipped_or_replaced(tokenizer, tmp_path):
    file = written(tmp_path, CHAT, chat(("user", "a\0"), ("assistant", "b")))
    examples, report = read_examples([file], tokenizer, on_bad_text="skip")
    assert (len(examples), report.unusable) == (1, 1)
    examples, report = read_examples([file], tokenizer, on_bad_text="replace")
    assert (len(examples), report.replaced) == (2, 1)
    assert "a\ufffd" in tokenizer.decode(examples[1].ids)


LOOKS_AHEAD = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content | upper }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    files = {name: content for name, content in tokenizer.files.items() if name != "chat_template.jinja"}
    return Tokenizer.from_files({**files, "chat_template.jinja": template.encode()}, tokenizer.path)


def test_a_template_without_the_prefix_property_is_refused_by_name(tokenizer, tmp_path):
    odd = with_template(tokenizer, LOOKS_AHEAD)
    file = written(tmp_path, {"messages": [USER, ANSWER, USER, ANSWER]})
    with pytest.raises(
        UsageError, match=r"line 1: .*chat_template\.jinja: this chat template writes message 2 otherwise"
    ):
        read_examples([file], odd)
    assert read_examples([file], odd, learn="all")[0]
    with pytest.raises(UsageError, match="has no chat template"):
        read_examples([file], Tokenizer(tokenizer.core, roles=tokenizer.roles))


def test_another_template_without_special_tokens(tokenizer, tmp_path):
    plain = with_template(
        tokenizer,
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    [example], _ = read_examples([written(tmp_path, {"messages": [USER, ANSWER, USER, ANSWER]})], plain)
    assert learnt(example, plain) == [" Hello\n"] * 2


def test_preference_pairs(tokenizer, tmp_path):
    other = {"role": "assistant", "content": "Go away"}
    rows = {
        "messages": {"prompt": [USER], "chosen": [ANSWER], "rejected": [other]},
        "implied": {"chosen": [USER, ANSWER], "rejected": [USER, other]},
        "implied, and the prompt's text": {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, other]},
    }
    for row in rows.values():
        [pair], report = read_pairs([written(tmp_path, row)], tokenizer)
        assert learnt(pair.chosen, tokenizer) == ["Hello<|im_end|>\n"]
        assert learnt(pair.rejected, tokenizer) == ["Go away<|im_end|>\n"]
        assert report.lines()[0] == "read 1 preference pair from 1 file"
    text = {"prompt": "The sky is", "chosen": " blue", "rejected": " red"}
    [pair], _ = read_pairs([written(tmp_path, text)], tokenizer)
    assert [learnt(side, tokenizer) for side in (pair.chosen, pair.rejected)] == [
        [" blue<|im_end|>"],
        [" red<|im_end|>"],
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (CHAT, "has no chosen and rejected: DPO learns preference pairs; --method sft a chat"),
        ({"chosen": [USER, ANSWER], "rejected": "a"}, "chosen and rejected must both be texts, or both lists"),
        ({"chosen": [ANSWER], "rejected": [USER]}, "has no prompt, and chosen and rejected begin differently"),
        (
            {"prompt": [ANSWER], "chosen": [USER], "rejected": [USER]},
            "prompt ends with .*prompt and chosen swapped",
        ),
    ],
)
def test_a_pair_that_does_not_fit_is_named(tokenizer, tmp_path, row, said):
    with pytest.raises(SmolLMError, match=f"line 1:? {said}"):
        read_pairs([written(tmp_path, row)], tokenizer)


def test_pairs_whose_prompt_fills_the_context_are_counted(tokenizer, tmp_path):
    long = {"prompt": "word " * 50, "chosen": "a", "rejected": "b"}
    short = {"prompt": "word", "chosen": " a" * 50, "rejected": " b"}
    pairs, report = read_pairs([written(tmp_path, long, short)], tokenizer, max_length=16)
    assert (len(pairs), report.filled, report.truncated) == (1, 1, 1)
    assert (len(pairs[0].chosen.ids), len(pairs[0].rejected.ids)) == (16, 3)


def example(*ids: int, learnt: str) -> Example:
    return Example(np.array(ids, np.int32), np.array([c == "1" for c in learnt]))


def test_targets_are_the_tokens_that_follow_and_are_learnt():
    rows = packed([example(1, 2, 3, learnt="111"), example(4, 5, learnt="11"), example(6, 7, 8, learnt="001")], 6)
    assert rows.tokens.tolist() == [[1, 2, 3, 6, 7, 8], [4, 5, 0, 0, 0, 0]]
    assert rows.targets.tolist() == [[2, 3, -1, -1, 8, -1], [5, -1, -1, -1, -1, -1]]
    assert rows.documents.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, -1, -1, -1, -1]]
    assert rows[1:].tokens.tolist() == [[4, 5, 0, 0, 0, 0]]
    both = packed([example(1, 2, learnt="11"), example(3, 4, learnt="11")], 4)
    assert both.targets.tolist() == [[2, -1, 4, -1]], "a document's first token follows no token of its own"
    alone = padded([example(1, 2, 3, learnt="011"), example(4, 5, learnt="01")], 4)
    assert alone.targets.tolist() == [[2, 3, -1, -1], [5, -1, -1, -1]]


def test_the_row_with_the_least_space_is_filled_and_of_equal_ones_the_first():
    assert best_fit([5, 6, 7, 3, 2, 4], 10) == [[2, 3], [1, 5], [0, 4]]
    assert best_fit([6, 6, 4, 4], 10) == [[0, 2], [1, 3]]
    assert best_fit([4], 4) == [[0]]


def test_the_mask_shows_what_is_learnt(tokenizer, tmp_path):
    row = {"messages": [USER, {"role": "assistant", "content": "Hello 😀\nthere\x1b"}]}
    [example], _ = read_examples([written(tmp_path, row)], tokenizer)
    shown = mask_of(example, tokenizer)
    assert "assistant↵\n⟦Hello 😀↵\nthere<0x1b><|im_end|>⟧↵\n" in shown.plain
    styles = {str(span.style) for span in shown.spans if "Hello" in shown.plain[span.start : span.end]}
    assert styles <= {"black on green", "black on bright_green"}
