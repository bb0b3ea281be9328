"""What is learnt of a row is what TRL learns of it: the same ids, the same labels, the same rows of a batch."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.data_utils import _pack_bfd, pack_dataset

from conftest import asset
from smollm_jax.data.examples.examples import Example, read_examples, read_pairs
from smollm_jax.data.examples.packing import packed, padded
from smollm_jax.tokenizer.training_template import TRAINING_TEMPLATE

LENGTH = 128  # tokens of a row, so that many are cut
ROLES = ("user", "assistant")


@pytest.fixture(scope="module")
def theirs(weights_path):
    return AutoTokenizer.from_pretrained(weights_path)


@pytest.fixture(scope="module")
def chats() -> list[dict[str, Any]]:
    """The first 1,000 conversations of the demo's set."""
    lines = (asset("chats") / "chats.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:1000]]


def prepared(theirs: Any, rows: list[dict[str, Any]], *, packing: bool = False, **options: Any) -> list[dict[str, Any]]:
    """TRL's rows of a data set: `SFTTrainer` without a model, for it to prepare."""
    trainer = SFTTrainer.__new__(SFTTrainer)
    trainer._tokenizer, trainer._is_vlm = theirs, False
    trainer.chat_template = TRAINING_TEMPLATE if "assistant_only_loss" in options else None
    trainer.completion_only_loss = "prompt" in rows[0] and options.pop("completion_only_loss", True)
    arguments = SFTConfig(output_dir="unused", report_to=[], use_cpu=True, **options)
    data = datasets.Dataset.from_list(rows)
    return list(trainer._prepare_dataset(data, theirs, arguments, packing, None, "train"))


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def assert_same(examples: list[Example], rows: list[dict[str, Any]]) -> None:
    assert len(examples) == len(rows)
    for number, (example, row) in enumerate(zip(examples, rows, strict=True)):
        assert example.ids.tolist() == row["input_ids"], number
        assert np.where(example.learnt, example.ids, -100).tolist() == row["labels"], number


def test_the_training_template_writes_the_text_of_the_released_one(theirs, chats):
    for chat in [*chats[:20], {"messages": [{"role": "system", "content": " s\n"}, {"role": "user", "content": ""}]}]:
        for prompt in (False, True):
            options = {"tokenize": False, "add_generation_prompt": prompt}
            text = theirs.apply_chat_template(chat["messages"], chat_template=TRAINING_TEMPLATE, **options)
            assert text == theirs.apply_chat_template(chat["messages"], **options)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_ids_labels_and_packed_rows_of_conversations(tokenizer, theirs, chats, tmp_path, count):
    rows = prepared(theirs, chats[:count], assistant_only_loss=True, max_length=1024)
    examples, report = read_examples([written(tmp_path, *chats[:count])], tokenizer, max_length=1024)
    assert_same(examples, rows)
    assert report.learnt == sum(label != -100 for row in rows for label in row["labels"][1:])
    ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
    assert_same_rows(packed(examples, 1024), bins(ids, labels, 1024))


def bins(ids: list[list[int]], labels: list[list[int]], length: int) -> list[dict[str, Any]]:
    """TRL's packed rows of up to 1,000 examples, which `pack_dataset` maps it over."""
    return _pack_bfd(pyarrow.table({"input_ids": ids, "labels": labels}), length).to_pylist()


def assert_same_rows(ours: Any, rows: list[dict[str, Any]]) -> None:
    """Tokens, documents and what follows each token; TRL's collator sets each document's first label to -100."""
    assert len(ours) == len(rows)
    for tokens, targets, documents, row in zip(ours.tokens, ours.targets, ours.documents, rows, strict=True):
        count = len(row["input_ids"])
        assert tokens[:count].tolist() == row["input_ids"]
        assert np.bincount(documents[:count]).tolist() == row["seq_lengths"]
        assert set(documents[count:]) <= {-1}
        labels = np.array(row["labels"])
        labels[np.cumsum([0, *row["seq_lengths"][:-1]])] = -100
        assert targets.tolist() == [*np.where(labels == -100, -1, labels)[1:], *[-1] * (len(tokens) - count + 1)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(8, 32))
def test_packing_of_any_lengths(lengths, length):
    ids = [[100 * i + j for j in range(n)] for i, n in enumerate(lengths, 1)]
    examples = [Example(np.array(row[:length], np.int32), np.ones(len(row[:length]), bool)) for row in ids]
    assert_same_rows(packed(examples, length), bins(ids, ids, length))


def test_packing_goes_by_1000_rows(theirs):
    lengths = np.random.default_rng(0).integers(1, 65, 2500).tolist()
    ids = [list(range(n)) for n in lengths]
    rows = list(pack_dataset(datasets.Dataset.from_dict({"input_ids": ids, "labels": ids}), 64, "bfd"))
    assert_same_rows(packed([Example(np.array(row, np.int32), np.ones(len(row), bool)) for row in ids], 64), rows)


CONTENT = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cn", "Cs"]), max_size=20),
    st.sampled_from(
        ["", " ", "\n", "\n\n", " \n x\n\n", "\r\n", "\t", "😀", "👩‍👧 é", "1234", "<", "|>", "assistant\n", "a" * 90]
    ),
    st.lists(st.sampled_from(["\n", " ", "word", "?!", "é", "日本", "\u200d", "\u00a0"]), max_size=12).map("".join),
)


@st.composite
def conversations(draw):
    """Turns of any roles in any order, with an answer among them."""
    roles = draw(st.lists(st.sampled_from(["user", "assistant", "system", "tool"]), max_size=6))
    roles.insert(draw(st.integers(0, len(roles))), "assistant")
    return [{"role": role, "content": draw(CONTENT)} for role in roles]


def lacks(tokenizer: Any, messages: list[dict[str, str]]) -> bool:
    return any(tokenizer.unencodable(message["content"]) for message in messages)


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(conversations())
def test_ids_and_mask_of_500_made_up_conversations(tokenizer, theirs, messages):
    if lacks(tokenizer, messages):
        return
    expected = theirs.apply_chat_template(
        messages, chat_template=TRAINING_TEMPLATE, return_assistant_tokens_mask=True, return_dict=True
    )
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    ids, spans = tokenizer.encode_answers(messages, answers)
    mask = np.zeros(len(ids), int)
    for start, stop in spans:
        mask[start:stop] = 1
    assert ids == expected["input_ids"]
    assert mask.tolist() == expected["assistant_masks"]


def test_a_special_token_in_a_message_is_text_to_us_and_one_to_transformers(tokenizer, theirs):
    """The one difference: in TRL a message can end its turn, and what follows is not learnt."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "one<|im_end|>two"}]
    ids, [(start, stop)] = tokenizer.encode_answers(messages, [1])
    end = tokenizer.token_to_id("<|im_end|>")
    assert tokenizer.decode(ids) == theirs.apply_chat_template(messages, tokenize=False)
    assert ids[start:stop].count(end) == 1
    assert theirs.apply_chat_template(messages)["input_ids"].count(end) == ids.count(end) + 1


def asked(rows: list[dict[str, Any]], answer: str) -> list[dict[str, Any]]:
    """The first two messages of each conversation as a prompt and what answers it."""
    return [{"prompt": chat["messages"][:1], answer: chat["messages"][1:2]} for chat in rows]


TEXTS = ["The sky is", " blue", " blue.\n", "un", "happy ", "", "x<|im_end|>", " ", "a\n", "\n\nb", "12", "3", "é"]


def test_prompts_and_completions_of_messages(tokenizer, theirs, chats, tmp_path):
    file = written(tmp_path, *(rows := asked(chats[:100], "completion")))
    theirs_rows = prepared(theirs, rows, max_length=LENGTH)
    assert_same(read_examples([file], tokenizer, learn="completion", max_length=LENGTH)[0], theirs_rows)
    assert any(len(row["input_ids"]) == LENGTH for row in theirs_rows)
    both = prepared(theirs, rows, max_length=LENGTH, assistant_only_loss=True)
    assert_same(read_examples([file], tokenizer, max_length=LENGTH)[0], both)
    everything = prepared(theirs, rows, max_length=LENGTH, completion_only_loss=False)
    assert_same(read_examples([file], tokenizer, learn="all", max_length=LENGTH)[0], everything)


def test_prompts_and_completions_of_text(tokenizer, theirs, tmp_path):
    texts = [text for text in TEXTS if "<|" not in text]
    rows = [{"prompt": prompt, "completion": completion} for prompt in texts if prompt for completion in TEXTS]
    assert_same(read_examples([written(tmp_path, *rows)], tokenizer)[0], prepared(theirs, rows, max_length=LENGTH))


def test_texts(tokenizer, theirs, chats, tmp_path):
    rows = [{"text": chat["messages"][0]["content"]} for chat in chats[:100]] + [{"text": "x<|im_end|>"}]
    examples, _ = read_examples([written(tmp_path, *rows)], tokenizer, max_length=LENGTH)
    assert_same(examples, prepared(theirs, rows, max_length=LENGTH))


def pairs_of_trl(theirs: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer._tokenizer, trainer._is_vlm = theirs, False
    arguments = DPOConfig(output_dir="unused", report_to=[], use_cpu=True, max_length=LENGTH)
    return list(trainer._prepare_dataset(datasets.Dataset.from_list(rows), theirs, arguments, "train"))


def preferences(chats: list[dict[str, Any]], how: str) -> list[dict[str, Any]]:
    chosen, rejected = (asked(chats[i : i + 60], "answer") for i in (0, 500))
    rows = [
        {"prompt": chosen_row["prompt"], "chosen": chosen_row["answer"], "rejected": rejected_row["answer"]}
        for chosen_row, rejected_row in zip(chosen, rejected, strict=True)
    ]
    if how == "implied":
        return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    if how == "messages":
        return rows
    texts = [{name: messages[0]["content"] for name, messages in row.items()} for row in rows]
    if how == "text":
        return texts
    return [{side: f"{row['prompt']} {row[side]}" for side in ("chosen", "rejected")} for row in texts]


@pytest.mark.parametrize("how", ["messages", "implied", "text", "implied text"])
def test_preference_pairs(tokenizer, theirs, chats, tmp_path, how):
    rows = preferences(chats, how)
    pairs, report = read_pairs([written(tmp_path, *rows)], tokenizer, max_length=LENGTH)
    expected = pairs_of_trl(theirs, rows)
    assert len(pairs) == len(expected)
    assert report.filled == len(rows) - len(expected)
    for pair, row in zip(pairs, expected, strict=True):
        for side, name in ((pair.chosen, "chosen_ids"), (pair.rejected, "rejected_ids")):
            assert side.ids.tolist() == (row["prompt_ids"] + row[name])[:LENGTH]
            assert side.learnt.tolist() == ([False] * len(row["prompt_ids"]) + [True] * len(row[name]))[:LENGTH]


def test_padded_rows_are_one_example_each(tokenizer, chats, tmp_path):
    examples, _ = read_examples([written(tmp_path, *chats[:20])], tokenizer, max_length=LENGTH)
    rows = padded(examples, LENGTH)
    assert len(rows) == len(examples)
    for tokens, targets, documents, example in zip(rows.tokens, rows.targets, rows.documents, examples, strict=True):
        n = len(example.ids)
        assert tokens[:n].tolist() == example.ids.tolist()
        assert targets[: n - 1].tolist() == np.where(example.learnt, example.ids, -1)[1:].tolist()
        assert (targets[n - 1 :] == -1).all()
        assert (documents[:n] == 0).all()
        assert (documents[n:] == -1).all()
