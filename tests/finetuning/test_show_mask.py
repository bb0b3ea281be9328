"""finetune.py --show-mask prints which tokens would be learnt, and starts no run."""

import json

import pytest

from smollm_jax.commands import command_line, finetune
from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.finetuning.flags import Flags
from smollm_jax.runtime.signals import StopSignal
from smollm_jax.runtime.startup import QuickStart

CHATS = [
    {"messages": [{"role": "user", "content": f"Question {i}"}, {"role": "assistant", "content": f"Answer {i}"}]}
    for i in range(5)
]


def begin(*flags: str) -> None:
    finetune.begin(command_line.parse(Flags, flags, None), StopSignal(), QuickStart())


def test_it_prints_the_first_examples_and_trains_nothing(weights_path, tmp_path, capsys):
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    common = ["--data", str(tmp_path / "chats.jsonl"), "--weights", str(weights_path), "--out", str(tmp_path / "run")]
    begin(*common, "--show-mask", "2")
    text = capsys.readouterr().out
    assert "user↵\nQuestion 0<|im_end|>↵\n<|im_start|>assistant↵\n⟦Answer 0<|im_end|>⟧↵\n" in text
    assert "Answer 1" in text
    assert "Answer 2" not in text
    assert "read 2 chats from 1 file" in text
    begin(*common, "--show-mask", "1", "--learn", "all")
    assert "⟦<|im_start|>system" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_user_s_mistakes_are_a_line_each(weights_path, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="--show-mask must be a number of examples, got -1"):
        finetune.main(["--show-mask", "-1"])
    with pytest.raises(UsageError, match="--show-mask trains nothing: leave --resume out"):
        finetune.main(["--show-mask", "1", "--resume"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputFileError, match=r"assets/chats: no such folder: fetch it with `python scripts/fetch_assets\.py chats`"
    ):
        begin("--weights", str(weights_path), "--show-mask", "1")
