"""Fresh weights of the tiny shape, chats about sums, and the command in this process."""

import json

import pytest

from smollm_jax import weights
from smollm_jax.commands import command_line, finetune
from smollm_jax.config import preset
from smollm_jax.finetuning.flags import Flags
from smollm_jax.runs.metrics import RunLog
from smollm_jax.runtime.signals import StopSignal
from smollm_jax.runtime.startup import QuickStart
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.training.state import init_model
from tests.trainer import KilledError

CHATS = [
    [
        {"role": "user", "content": f"What is {a} plus {b}?"},
        {"role": "assistant", "content": f"{a} plus {b} is {a + b}."},
    ]
    for a in range(4)
    for b in range(6)
]


@pytest.fixture(scope="module")
def base(tokenizer_path, tmp_path_factory):
    """Fresh weights of the tiny shape with the base model's tokenizer, which has no chat template."""
    folder = tmp_path_factory.mktemp("weights") / "base"
    files = Tokenizer.load(tokenizer_path).files
    weights.write(folder, weights.to_bundle(init_model(preset("tiny"), 0), "tiny", files), "hf")
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    return path


@pytest.fixture
def run(monkeypatch, base, chats):
    """Runs the command in this process, with its signal handlers left out."""
    monkeypatch.setattr(StopSignal, "ignore", lambda _: None)

    def run(out, *flags, resume=False, data=chats):
        start = ["--resume"] if resume else ["--data", str(data), "--weights", str(base), "--steps", "6"]
        small = [] if resume else ["--sequence-length", "64", "--learning-rate", "1e-2", "--dtype", "float32"]
        arguments = [*start, *small, "--out", str(out), "--save-every", "2", "--eval-every", "3", *flags]
        finetune.begin(command_line.parse(Flags, arguments, None), StopSignal(), QuickStart())

    return run


@pytest.fixture
def killed(run, monkeypatch):
    """Runs the command until after the log of step 5, and then as after a kill: the last save is that of step 4."""

    def killed(out, *flags, **options):
        log = RunLog.step

        def dying(self, step, **values):
            log(self, step, **values)
            if step == 5:
                raise KilledError

        with monkeypatch.context() as patch:
            patch.setattr(RunLog, "step", dying)
            with pytest.raises(KilledError):
                run(out, *flags, **options)

    return killed
