"""The report measures weights anyone brings, and says so when a rung fails."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smollm_jax import weights

ROOT = Path(__file__).parent.parent
HIDE_TRANSFORMERS = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "transformers" else find(name, *rest)
"""


@pytest.fixture(scope="module")
def tiny_weights(tiny_model, tokenizer_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny"
    from smollm_jax.formats import read_tokenizer_files

    weights.write(path, weights.to_bundle(tiny_model, "random", read_tokenizer_files(tokenizer_path)), "orbax")
    return path


def report(path, out, **environment):
    command = [sys.executable, "scripts/parity_report.py", "--weights", path, "--out", out]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def rungs(out):
    return {rung["claim"]: rung for rung in json.loads((out / "report.json").read_text())["rungs"]}


@pytest.fixture(scope="module")
def dry_run():
    """Folder and summary of the GPU suite, run at toy size on the CPU."""
    for old in ROOT.glob("benchmarks/dry-run-test-*"):
        shutil.rmtree(old)
    command = ["bash", "scripts/gpu_suite.sh", "--dry-run", "dry-run-test"]
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    (folder,) = ROOT.glob("benchmarks/dry-run-test-*")
    return folder, json.loads((folder / "summary.json").read_text())


def test_every_stage_of_the_gpu_suite_runs(dry_run):
    folder, summary = dry_run
    stages = {row["stage"]: row["exit_status"] for row in summary["stages"]}
    passed = json.loads((folder / "parity/report.json").read_text())["passed"]
    # On random weights transformers' error is no yardstick: the report may say so, having run.
    assert stages.pop("parity") == (0 if passed else 1)
    assert stages == dict.fromkeys(
        ("weights", "attention-check", "train", "train-twin", "curves", "train-resumed", "generate", "speed-1"), 0
    )
    curves = json.loads((folder / "curves.json").read_text())
    assert len(curves["apart"]) == 4
    assert curves["furthest"] < 1e-5
    assert {row["attention"] for row in json.loads((folder / "attention-check.json").read_text())["rows"]} == {
        "causal",
        "packed",
    }
    assert summary["best_over_best"]["hf"]["other"]["stage"] == "speed-1"
    assert "| speed-1 | tokens/s, ours / hf |" in (folder / "table.md").read_text()


def test_it_reports_every_rung_on_any_weights(dry_run):
    folder, _ = dry_run
    found = rungs(folder / "parity")
    assert {rung["rung"][0] for rung in found.values()} >= {*"1235789"}
    equal = ("logits, JAX against the twin", "gradients, worst tensor", "logits, JAX against transformers")
    assert all(found[claim]["passed"] for claim in equal)
    lost = [found[f"what {kind} loses of the weights, RMS"] for kind in ("f16", "bf16", "q8_0")]
    assert all(rung["passed"] and rung["measured"] > 1e-4 for rung in lost)
    assert all("perplexity" in rung["noise"] for rung in lost)
    page = (folder / "parity/index.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page, "the page asks for something from outside"


def test_a_bug_fails_it_and_missing_transformers_is_said(tiny_weights, tmp_path):
    """Two claims in one run of a minute: the second interpreter finds no transformers, and gate and up are swapped."""
    (tmp_path / "sitecustomize.py").write_text(HIDE_TRANSFORMERS)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = report(tiny_weights, tmp_path / "report", PYTHONPATH=path, SMOLLM_MUTANT="gate and up swapped")
    assert done.returncode == 1
    found, page = rungs(tmp_path / "report"), (tmp_path / "report/index.html").read_text()
    assert not found["logits, JAX against the twin"]["passed"]
    assert not found["loss of 10 float32 steps, JAX against the twin"]["passed"]
    assert "NOT the same function" in page
    assert "measuring transformers" not in done.stdout
    assert "logits, JAX against twin" in found
    assert "transformers is not installed" in page
