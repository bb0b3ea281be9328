"""Rung 11: evaluation results are equal: loss and perplexity of a text, and lm-evaluation-harness's answers.

The tasks are made from the real speeches: choose a continuation, score a paragraph, continue a text.
"""

import json
import math
import re
import time
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import tokenizers
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from parity_tests.conftest import load_hf
from smollm_jax import weights
from smollm_jax.commands import evaluate
from smollm_jax.commands import lm_eval as run_lm_eval
from smollm_jax.data.text import documents
from smollm_jax.data.text_sources import text_files
from smollm_jax.errors import UsageError
from smollm_jax.evaluation.lm_eval_model import SmolLMHarness
from smollm_jax.generation.engine import Engine
from smollm_jax.weights.bundle import Bundle
from smollm_parity.tolerances import LOGLIKELIHOOD, QUALITY, within
from tests.small_files import SMALL, small_tensors, small_tokenizer

DOCUMENTED = Path(__file__).parent.parent / "docs/serving.md"
YAML = {
    "speech_choice": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "speech_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{paragraph}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
""",
    "speech_writing": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


@pytest.fixture(scope="module")
def tasks(text_path, tmp_path_factory):
    """A folder of the three tasks, on 200 passages."""
    folder, draw = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    text = " ".join(next(iter(documents(file))) for file in text_files(text_path)[:60])
    sentences = [" ".join(sentence.split()) + "." for sentence in text.split(".") if 8 <= len(sentence.split()) <= 20]
    rows = []
    for i in range(200):
        choices = [f" {sentences[5 * i + 2]}", *(f" {sentences[j]}" for j in draw.integers(1100, len(sentences), 3))]
        order = draw.permutation(4)
        rows.append(
            {
                "context": f"{sentences[5 * i]} {sentences[5 * i + 1]}",
                "choices": [choices[j] for j in order],
                "label": int(np.argmin(order)),
                "paragraph": " ".join(sentences[5 * i : 5 * i + 3]),
            }
        )
    (folder / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in YAML.items():
        where = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        data = f"dataset_kwargs: {{data_files: {{test: {folder / 'passages.jsonl'}}}}}\n"
        (folder / f"{name}.yaml").write_text(where + data + task.lstrip())
    return folder


@pytest.fixture(scope="module")
def harness(weights_path):
    return SmolLMHarness(Engine.load(weights_path), quiet=True)


def answers(model, folder, name, limit):
    """A task's scores, all answers, and its duration in seconds."""
    manager, began = TaskManager(include_path=str(folder), include_defaults=False), time.perf_counter()
    got = lm_eval.simple_evaluate(model, tasks=[name], task_manager=manager, limit=limit, bootstrap_iters=0)
    seconds = time.perf_counter() - began
    scores = {key: value for key, value in got["results"][name].items() if isinstance(value, float)}
    return scores, [sample["resps"] for sample in got["samples"][name]], seconds


@pytest.mark.parametrize(
    "limit", [pytest.param(8, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.overnight)]
)
def test_the_harness_gets_the_answers_of_its_own_hf_model(tasks, weights_path, hf, harness, limit):
    """Runs the two in turn, task by task, so that their durations are comparable; with 200 samples ours is faster."""
    its_own = HFLM(pretrained=hf, tokenizer=AutoTokenizer.from_pretrained(weights_path), batch_size=8)
    theirs, ours = {}, {}
    for name in YAML:
        theirs[name], ours[name] = (answers(model, tasks, name, limit) for model in (its_own, harness))
        seconds = f"ours {ours[name][2]:.0f} s, hf {theirs[name][2]:.0f} s"
        print(f"{name}: {limit} samples, {seconds}, scores {ours[name][0]}")
        assert len(ours[name][1]) == limit
        # A perplexity is the exponential of some nats a word, here 5.4: ten times the relative error of its logarithm.
        assert ours[name][0] == pytest.approx(theirs[name][0], rel=10 * LOGLIKELIHOOD)
    assert ours["speech_writing"][1] == theirs["speech_writing"][1]
    pairs = []
    for a, b in zip(ours["speech_choice"][1], theirs["speech_choice"][1], strict=True):
        assert [greedy for ((_, greedy),) in a] == [greedy for ((_, greedy),) in b]
        pairs += [(x, y) for ((x, _),), ((y, _),) in zip(a, b, strict=True)]
    pairs += [(a[0][0], b[0][0]) for a, b in zip(ours["speech_rolling"][1], theirs["speech_rolling"][1], strict=True)]
    x, y = np.array(pairs, float).T
    within(np.abs(x / y - 1).max(), LOGLIKELIHOOD, f"log-likelihood of {len(pairs)} continuations and paragraphs")


@pytest.mark.parametrize("ends", [["<|endoftext|>"], []])
def test_the_harness_puts_around_a_text_what_the_post_processor_puts_there(tmp_path, ends):
    """As the harness's `hf` model does, except for a text that already starts with BOS."""
    weights.write(tmp_path / "hf", Bundle(small_tensors(), SMALL, small_tokenizer()), "hf")
    path = tmp_path / "hf/tokenizer.json"
    core = tokenizers.Tokenizer.from_file(str(path))
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=["<|endoftext|>", "$A", *ends], special_tokens=[("<|endoftext|>", 0)]
    )
    core.save(str(path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    its_own = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "hf"), batch_size=1)
    ours = SmolLMHarness(Engine.load(tmp_path / "hf"), quiet=True, on_bad_text="skip")
    assert ours.tok_encode("the") == [0, *ours.tok_encode("the", add_special_tokens=False), *(0 for _ in ends)]
    for text in ("the cat", "<|endoftext|>the cat", "", " the"):
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == its_own.tok_encode(text, special)
    assert ours._encode_pair("the cat ", "the") == its_own._encode_pair("the cat ", "the")


@pytest.mark.slow
def test_the_command_scores_local_tasks_and_refuses_what_it_cannot(tasks, trained, tmp_path, monkeypatch, capsys):
    """On a run trained here; also checks that every task named in the docs exists in the harness."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    arguments = ["--weights", str(trained), "--include", str(tasks), "--out", str(tmp_path / "r.json")]
    run_lm_eval.main([*arguments, "--tasks", "speech_choice", "--limit", "3"])
    assert "|speech_choice|" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "r.json").read_text())["samples"]["speech_choice"]) == 3
    with pytest.raises(UsageError, match=r"r\.json: exists already"):
        run_lm_eval.main([*arguments, "--tasks", "speech_choice"])
    documented = DOCUMENTED.read_text(encoding="utf-8")
    command = re.search(r"run_lm_eval.py --weights PATH --tasks ((?:\w+|\\\n|[ ])+)  #", documented)
    named = command[1].replace("\\\n", " ").split()
    assert len(named) == 9
    with pytest.raises(UsageError, match=r"no task is called no_such_task$"):
        run_lm_eval.main([*arguments[:4], "--tasks", *named, "no_such_task"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"max_gen_toks": 8192}, "asks for 8192 new tokens"),
        ({"top_p": 0, "do_sample": True}, "top_p"),
    ],
)
def test_what_a_task_asks_for_in_vain_is_refused(harness, arguments, message):
    with pytest.raises(UsageError, match=message):
        harness._parse_gen_kwargs({"until": ["."], **arguments})


def test_the_quality_on_a_text_is_transformers(source, exported, text_path, tmp_path, monkeypatch):
    """The output of `scripts/evaluate.py` for the real weights and for a run trained here."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    text = next(iter(documents(text_path / "1861-Lincoln-1.txt")))[:3000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    length, stride = 256, 96
    flags = ["--length", str(length), "--stride", str(stride), "--out", str(tmp_path / "quality")]
    evaluate.main(["--weights", str(source), "--data", str(tmp_path / "text.txt"), *flags])
    (ours,) = json.loads((tmp_path / "quality/quality.json").read_text())

    hf, tokenizer = load_hf(exported), AutoTokenizer.from_pretrained(exported)
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    nats, scored = 0.0, 1
    for begin in range(0, len(ids), stride):
        end = min(begin + length + 1, len(ids))
        with torch.inference_mode():
            logprobs = hf(torch.tensor([ids[begin : end - 1]])).logits[0].double().log_softmax(-1)
        targets = torch.tensor(ids[begin + 1 : end])
        nats -= float(logprobs[torch.arange(len(targets)), targets][scored - begin - 1 :].sum())
        scored = end
        if end == len(ids):
            break
    size = len(text.encode())
    assert (ours["tokens"], ours["bytes"], ours["documents"]) == (len(ids) - 1, size, 1)
    within(abs(ours["loss"] / (nats / ours["tokens"]) - 1), QUALITY, "loss on a text, strided windows")
    within(abs(ours["bits_per_byte"] / (nats / math.log(2) / size) - 1), QUALITY, "bits per byte on a text")
    assert ours["perplexity"] == pytest.approx(math.exp(nats / ours["tokens"]), rel=10 * QUALITY)
