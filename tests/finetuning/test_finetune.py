"""Fine-tuning from the command line: a run learns, resumes exactly, and can be used as weights."""

import dataclasses
import json

import numpy as np
import pytest

from smollm_jax import weights
from smollm_jax.commands import command_line, finetune
from smollm_jax.config import preset
from smollm_jax.config.finetune_recipe import FinetuneRecipe, named
from smollm_jax.config.hf_config import read_config
from smollm_jax.data.examples.examples import Example
from smollm_jax.errors import InputFileError, SmolLMError
from smollm_jax.finetuning.batches import split
from smollm_jax.finetuning.chat_format import TEMPLATE, with_chat_format
from smollm_jax.finetuning.flags import Flags
from smollm_jax.runs.metrics import RunLog, read_metrics
from smollm_jax.runs.pytree import flatten
from smollm_jax.runtime.signals import StopSignal
from smollm_jax.runtime.startup import QuickStart
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.training import optimizer
from smollm_jax.training.state import init_model
from tests.trainer import final_state, losses

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

    def run(out, *flags, resume=False):
        start = ["--resume"] if resume else ["--data", str(chats), "--weights", str(base), "--steps", "6"]
        small = [] if resume else ["--sequence-length", "64", "--learning-rate", "1e-2", "--dtype", "float32"]
        arguments = [*start, *small, "--out", str(out), "--save-every", "2", "--eval-every", "3", *flags]
        finetune.begin(command_line.parse(Flags, arguments, None), StopSignal(), QuickStart())

    return run


class KilledError(Exception):
    """Stands for a kill: nothing more is written."""


def test_a_run_that_dies_goes_on_bit_for_bit_and_is_weights_like_any_other(tmp_path, run, capsys, monkeypatch):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(straight)
    printed = capsys.readouterr().out
    assert "read 24 chats from 1 file" in printed
    assert printed.index("  before    ") < printed.index("  after     ")

    log = RunLog.step

    def dying(self, step, **values):
        log(self, step, **values)
        if step == 5:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "step", dying)
        with pytest.raises(KilledError):
            run(killed)
    run(killed, resume=True)
    assert losses(killed) == losses(straight)
    assert final_state(killed) == final_state(straight)

    rows = read_metrics(straight)
    held_out = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert list(held_out) == [0, 3, 6]
    assert held_out[6] < held_out[0] - 1
    for folder in (straight, killed):
        answers = json.loads((folder / "answers.json").read_text())
        assert [set(row) for row in answers] == [{"prompt", "before", "after"}]
        assert answers[0]["prompt"].startswith("What is ")
    # Of the base model it has made one that chats, to whoever reads the run.
    assert read_config(straight / "config.json").eos_token_id == 2
    assert json.loads((straight / "generation_config.json").read_text())["eos_token_id"] == 2
    bundle = weights.read(straight)
    assert Tokenizer.from_files(bundle.tokenizer_files, straight).chat_template == TEMPLATE


def test_a_base_model_gets_the_chat_format_of_the_instruct_one(tokenizer, tokenizer_path, weights_path):
    instruct = read_config(weights_path / "config.json")
    plain = dataclasses.replace(instruct, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    made, config, generation = with_chat_format(Tokenizer.load(tokenizer_path), plain)
    assert made.chat_template == tokenizer.chat_template
    assert made.roles == tokenizer.roles
    assert config == dataclasses.replace(instruct, pad_token_id=2)
    assert generation == json.loads((weights_path / "generation_config.json").read_text())
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert made.apply_chat_template(chat) == tokenizer.apply_chat_template(chat)
    unchanged, same, none = with_chat_format(tokenizer, instruct)
    assert (unchanged is tokenizer, same is instruct, none) == (True, True, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nothing.jsonl"], "nothing.jsonl"),
        (["--sequence-length", "1000000"], "--sequence-length 1000000 exceeds the model's"),
        (["--recipe", "huge"], "--recipe huge: unknown, known: laptop-sft, smollm2-sft"),
        (["--learning-rate", "-1"], "learning_rate must be positive"),
        (["--batch-size", "3", "--gradient-accumulation-steps", "2"], "must divide"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, run, flags, message):
    with pytest.raises(SmolLMError, match=message) as caught:
        run(tmp_path / "run", *flags)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists(), "a refused start leaves no folder"


def test_a_row_that_does_not_fit_names_file_row_and_field(tmp_path, run):
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"question": "b"}\n')
    with pytest.raises(InputFileError, match=r"wrong\.jsonl.*2.*question"):
        run(tmp_path / "run", "--data", str(wrong))


def test_steps_come_from_the_rows_and_from_flags():
    laptop = named("laptop-sft")
    assert laptop.resolve({"dtype": "float32"}, rows=10).steps == 15  # three epochs of two rows a step
    assert laptop.resolve({"dtype": "float32"}, rows=10_000).steps == 60
    assert laptop.resolve({"dtype": "float32", "steps": 7}, rows=10).warmup_steps == 1
    published = named("smollm2-sft").resolve({}, rows=12_800)
    assert (published.steps, published.warmup_steps, published.schedule) == (200, 20, "cosine")


def test_held_out_examples_are_drawn_by_the_seed_and_are_none_without_a_fraction():
    examples = [Example(np.array([i]), np.array([True])) for i in range(100)]
    train, held_out = split(examples, 0.05, 0)
    numbers = [int(example.ids[0]) for example in (*train, *held_out)]
    assert (len(held_out), sorted(numbers)) == (5, list(range(100)))
    assert [example.ids for example in split(examples, 0.05, 1)[1]] != [example.ids for example in held_out]
    assert split(examples, 0.0, 0) == (examples, [])
    assert [len(part) for part in split(examples[:1], 0.05, 0)] == [1, 0]


@pytest.mark.parametrize(
    ("schedule", "rates"), [("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]), ("constant", [0, 0.5, 1, 1, 1, 1])]
)
def test_schedules_of_transformers(schedule, rates):
    recipe = FinetuneRecipe(6, 1, 8, learning_rate=1.0, warmup_steps=2, dtype="float32", schedule=schedule)
    assert [float(optimizer.learning_rate(recipe)(step)) for step in range(6)] == pytest.approx(rates)


def test_weight_decay_leaves_the_norms_alone(tiny_model):
    decayed = flatten(optimizer.without_norms(tiny_model))
    assert {name for name, value in decayed.items() if not value} == {
        "layers.input_layernorm",
        "layers.post_attention_layernorm",
        "norm",
    }
