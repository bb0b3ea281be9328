"""A DPO run from its command line: it learns preferences, survives, and its reference stays what it was."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax import weights
from smollm_jax.commands import evaluate
from smollm_jax.config.finetune_recipe import named
from smollm_jax.data.examples.examples import read_examples, read_pairs
from smollm_jax.data.examples.packing import paired
from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.finetuning import reference
from smollm_jax.finetuning.chat_format import chat_tokenizer
from smollm_jax.finetuning.objectives import PreferencePairs, pair_losses
from smollm_jax.runs.metrics import read_metrics
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.weights.safetensors_file import read_safetensors
from tests.trainer import final_state, losses

DPO = ["--method", "dpo", "--learning-rate", "1e-3"]
LORA = ["--lora-rank", "4"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs of which the chosen answer is the right one."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {a} plus {b}?"}],
            "chosen": [{"role": "assistant", "content": f"{a} plus {b} is {a + b}."}],
            "rejected": [{"role": "assistant", "content": "Nobody knows."}],
        }
        for a in range(4)
        for b in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "adapter",
    [[], pytest.param([*LORA, "--lora-dropout", "0.1"], marks=pytest.mark.slow)],
    ids=["all parameters", "LoRA"],
)
def test_a_killed_run_resumes_bit_for_bit_with_the_reference_of_its_first_start(tmp_path, run, killed, pairs, adapter):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(straight, *DPO, *adapter, data=pairs)
    rows = [row for row in read_metrics(straight) if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6), "the policy is not its own reference"
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["rewards/margins"] > 0.05
    held_out = [row for row in read_metrics(straight) if "validation_loss" in row]
    assert held_out[-1]["validation_loss"] < held_out[0]["validation_loss"] - 0.01
    assert held_out[-1]["validation_rewards/accuracies"] == 1

    killed(resumed, *DPO, *adapter, data=pairs)
    before = (resumed / reference.FILE).stat().st_mtime_ns
    run(resumed, resume=True)
    assert (resumed / reference.FILE).stat().st_mtime_ns == before, "the reference was computed again"
    assert losses(resumed) == losses(straight)
    assert final_state(resumed) == final_state(straight)


@pytest.mark.slow
def test_a_lost_reference_is_computed_again_from_the_weights_of_the_start(tmp_path, run, pairs, base):
    out = tmp_path / "run"
    run(out, *DPO, data=pairs)
    kept, _ = read_safetensors(out / reference.FILE)
    (out / reference.FILE).unlink()
    run(out, "--steps", "7", resume=True)
    again, _ = read_safetensors(out / reference.FILE)
    for name, numbers in kept.items():
        both = ~np.isnan(numbers)
        assert both.any()
        np.testing.assert_array_equal(again[name][both], numbers[both])


forward = jax.jit(lambda model, row: model(row))


def logits_of(model, ids):
    """Logits `[T, V]` of one text, computed in a row of 64 tokens, so that one program serves all."""
    row = np.zeros((1, 64), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(forward(model, row))[0, : len(ids)]


def test_the_reference_is_the_log_probability_of_each_answer(tokenizer_path, base, pairs):
    tokenizer = chat_tokenizer(Tokenizer.load(tokenizer_path))
    few, _ = read_pairs([pairs], tokenizer, max_length=64, most=2)
    rows, model = paired(few, 64), weights.load(base)[0]
    batch = {name: jnp.asarray(array) for name, array in rows.arrays().items()}
    log_probs = reference.log_probs_of(model, batch, execution=ExecutionConfig("float32"))
    for number, pair in enumerate(few):
        for side, answer in enumerate((pair.chosen, pair.rejected)):
            logits = np.asarray(logits_of(model, answer.ids), np.float64)
            shifted = logits - logits.max(axis=1, keepdims=True)
            logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
            expected = sum(logs[i - 1, answer.ids[i]] for i in range(1, len(answer.ids)) if answer.learnt[i])
            assert log_probs[number, side] == pytest.approx(expected, rel=1e-5)


def test_the_losses_of_pairs_are_those_of_their_papers():
    ratios = np.array([[1.5, -2.0], [-0.5, 0.25]])
    lengths, beta, share = np.array([[3, 4], [2, 5]]), 0.3, 0.1
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    margin = beta * (ratios[:, 0] - ratios[:, 1])
    per_token = ratios / lengths
    robust = -(1 - share) * np.log(sigmoid(margin)) + share * np.log(sigmoid(-margin))
    expected = {
        "sigmoid": -np.log(sigmoid(margin)),
        "ipo": (per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta)) ** 2,
        "apo_zero": 1 - sigmoid(beta * ratios[:, 0]) + sigmoid(beta * ratios[:, 1]),
        "robust": robust / (1 - 2 * share),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(pair_losses(ratios, lengths, name, beta, share), values, rtol=1e-5, err_msg=name)


def test_padding_rows_count_for_nothing(base, tokenizer_path, pairs):
    few, _ = read_pairs([pairs], chat_tokenizer(Tokenizer.load(tokenizer_path)), max_length=64, most=2)
    batch = paired(few, 64).arrays() | {"reference": np.full((2, 2), -300.0, np.float32)}
    padding = {name: np.full_like(array, -1) for name, array in batch.items()}
    longer = {name: np.concatenate([array, padding[name]]) for name, array in batch.items()}
    model, execution = weights.load(base)[0], ExecutionConfig("float32")
    objective = PreferencePairs("sigmoid", 0.1, 0.0)
    log_probs = reference.log_probs_of(model, batch, execution=execution)
    expected = pair_losses(log_probs + 300, jnp.ones((2, 2)), "sigmoid", 0.1, 0.0).sum()
    counts, totals = [], []
    for arrays in (batch, longer):
        on_device = {name: jnp.asarray(array) for name, array in arrays.items()}
        counts.append(int(objective.count(on_device, execution)))
        total, metrics = jax.jit(objective.total, static_argnums=2)(model, on_device, execution, None)
        totals.append([float(total), *(float(metrics[name]) for name in sorted(metrics))])
    assert counts == [2, 2]
    np.testing.assert_allclose(totals[1], totals[0], rtol=1e-5)
    assert totals[0][0] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.slow
def test_an_adapter_of_an_earlier_run_is_the_reference_of_the_next(tmp_path, run, pairs, base):
    first, second = tmp_path / "first", tmp_path / "second"
    run(first, *LORA, "--learning-rate", "1e-2")
    run(second, *DPO, "--init-adapter", str(first / "adapter"), data=pairs)
    rows = [row for row in read_metrics(second) if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert (second / reference.ADAPTER / "adapter_model.safetensors").is_file()
    kept, _ = read_safetensors(second / reference.FILE)
    (second / reference.FILE).unlink()
    shutil.rmtree(first)
    run(second, "--steps", "7", resume=True)
    again, _ = read_safetensors(second / reference.FILE)
    both = ~np.isnan(kept["train"])
    np.testing.assert_array_equal(again["train"][both], kept["train"][both])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta", "-1"], "--beta must be positive, got -1"),
        (["--label-smoothing", "0.1"], "--label-smoothing is for --loss-type robust"),
        (["--loss-type", "robust", "--label-smoothing", "0.5"], "must be at least 0 and below 0.5"),
        (["--learn", "all"], "--learn is for --method sft"),
        (["--recipe", "smollm2-sft"], "--recipe smollm2-sft is for --method sft, not dpo"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, run, pairs, flags, message):
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "run", *DPO, *flags, data=pairs)
    assert not (tmp_path / "run").exists()


def test_data_and_method_that_do_not_fit_are_named(tmp_path, run, pairs, chats):
    with pytest.raises(InputFileError, match=r"chats\.jsonl: line 1 has no chosen and rejected: DPO learns"):
        run(tmp_path / "run", *DPO)
    with pytest.raises(InputFileError, match=r"pairs\.jsonl: line 1 has chosen and rejected: .* --method dpo"):
        run(tmp_path / "run", data=pairs)
    with pytest.raises(UsageError, match="--beta is for --method dpo"):
        run(tmp_path / "run", "--beta", "0.1")
    run(tmp_path / "run", "--steps", "2")
    with pytest.raises(UsageError, match="this run's method is sft"):
        run(tmp_path / "run", "--method", "dpo", resume=True)


def test_held_out_pairs_are_evaluated(tmp_path, pairs, base, capsys):
    evaluate.main(["--weights", str(base), "--chats", str(pairs), "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "quality.json").read_text())
    few, _ = read_pairs([pairs], chat_tokenizer(Tokenizer.of_weights(base)), max_length=512)
    model, right, nats, tokens = weights.load(base)[0], 0, 0.0, 0
    for pair in few:
        logs = [jax.nn.log_softmax(logits_of(model, side.ids)) for side in (pair.chosen, pair.rejected)]
        sums = [
            float(sum(log[i - 1, side.ids[i]] for i in range(1, len(side.ids)) if side.learnt[i]))
            for log, side in zip(logs, (pair.chosen, pair.rejected), strict=True)
        ]
        right, nats, tokens = right + (sums[0] > sums[1]), nats - sums[0], tokens + int(pair.chosen.learnt.sum())
    assert (row["pairs"], row["tokens"], row["accuracy"]) == (24, tokens, right / 24)
    assert row["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert "accuracy" in capsys.readouterr().out


def test_held_out_chats_are_evaluated(tmp_path, chats, base):
    evaluate.main(["--weights", str(base), "--chats", str(chats), "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "quality.json").read_text())
    examples, _ = read_examples([chats], chat_tokenizer(Tokenizer.of_weights(base)), max_length=512)
    model, nats, tokens = weights.load(base)[0], 0.0, 0
    for example in examples[:24]:
        log = np.asarray(jax.nn.log_softmax(logits_of(model, example.ids)))
        learnt = np.flatnonzero(example.learnt)
        nats, tokens = nats - log[learnt - 1, example.ids[learnt]].sum(), tokens + len(learnt)
    assert (row["examples"], row["tokens"], row["truncated"]) == (24, tokens, 0)
    assert row["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    with pytest.raises(UsageError, match="either --data, a text, or --chats"):
        evaluate.main(["--weights", str(base), "--chats", str(chats), "--data", str(chats)])


def test_the_published_numbers():
    recipe = named("smollm2-dpo").resolve({}, rows=12_800)
    assert (recipe.batch_size, recipe.sequence_length, recipe.learning_rate) == (128, 1024, 1e-6)
    assert (recipe.beta, recipe.schedule, recipe.steps, recipe.warmup_steps) == (0.5, "cosine", 200, 20)
    assert recipe.rows_per_step == 256
