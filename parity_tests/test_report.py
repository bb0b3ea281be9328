"""The parity report measures any weights, and names the rungs that fail."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smollm_jax import weights
from smollm_parity.page import TESTS_ONLY, page, write_readme
from smollm_parity.rungs import Rung, compared

ROOT = Path(__file__).parent.parent
HIDE_TRANSFORMERS = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "transformers" else find(name, *rest)
"""


@pytest.fixture(scope="module")
def tiny_weights(tiny_model, tokenizer_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny"
    from smollm_jax.tokenizer.source import read_tokenizer_files

    weights.write(path, weights.to_bundle(tiny_model, "random", read_tokenizer_files(tokenizer_path)), "orbax")
    return path


def report(path, out, **environment):
    command = [sys.executable, "scripts/parity_report.py", "--weights", path, "--out", out]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def rungs_of(out):
    return {rung["claim"]: rung for rung in json.loads((out / "report.json").read_text())["rungs"]}


@pytest.fixture(scope="module")
def dry_run():
    """The folder and summary of the GPU suite, run at toy size on the CPU."""
    for old in ROOT.glob("benchmarks/results/dry-run-test-*"):
        shutil.rmtree(old)
    command = ["bash", "scripts/gpu_suite.sh", "--dry-run", "dry-run-test"]
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    (folder,) = ROOT.glob("benchmarks/results/dry-run-test-*")
    return folder, json.loads((folder / "summary.json").read_text())


def stored(rungs: list[Rung], transformers: bool = True) -> dict:
    """The content of a report.json with these rungs."""
    backends = ["jax", "twin"] + ["transformers"] * transformers
    return {
        "weights": "some/weights",
        "origin": "random <weights>",
        "date": "2026-11-28",
        "seconds": 1,
        "command": "python scripts/parity_report.py --weights some/weights",
        "versions": {backend: {backend: "1.0"} for backend in backends},
        "passed": all(rung.passed for rung in rungs),
        "curves": {
            "layers": {f"{backend}, float32": [1e-6, 2e-6] for backend in backends},
            "positions": {backend: [1e-6, 2e-6] for backend in backends},
            "training": {"jax": [2.0, 1.0], "twin": [2.0, 1.0]},
        },
    }


GOOD = [
    Rung("1 float64", "logits", 7.5e-15, 1e-10, "1e-16 a rounding"),
    Rung("2 float32", "RMS error over transformers'", 0.84123, 1.5),
    Rung("8 generation", "of 10 greedy texts, how many differ", 0.0, 0.0),
]
BAD = [Rung("2 float32", "largest <error>", 1.5004, 1.5), Rung("3 bfloat16", "KL", math.nan, 1.2)]


@pytest.mark.parametrize(
    ("measured", "bound", "text"),
    [
        (0.84123, 1.5, "0.84 <= 1.5"),
        (1.5004, 1.5, "1.5004 > 1.5"),
        (1.4999, 1.5, "1.5 <= 1.5"),
        (7.5e-15, 1e-10, "7.5e-15 <= 1e-10"),
        (-0.0059, 0.02, "-0.0059 <= 0.02"),
        (0.0019, 2**-8, "0.0019 <= 0.0039"),
        (0.0, 0.0, "0 <= 0"),
        (1.0, 0.0, "1 > 0"),
        (123.4, 2.0, "123 > 2"),
        (12345.0, 2.0, "1.2e4 > 2"),
        (math.nan, 1.2, "nan, bound 1.2"),
        (math.inf, 1.2, "inf, bound 1.2"),
    ],
)
def test_a_number_is_written_against_its_bound_so_that_a_reader_sees_which_is_larger(measured, bound, text):
    assert compared(Rung("", "", measured, bound)) == text


def test_the_page_says_the_verdict_first_and_what_failed():
    good = page(stored(GOOD), GOOD)
    headline = re.search(r"<h1[^>]*>(.*?)</h1>", good)
    assert headline[1] == "The same function: all 3 claims on 3 rungs hold."
    assert re.sub("<[^>]*>", "", good[good.index("</style>") :]).strip().startswith(headline[1])
    assert '<td class="number">0.84 &lt;= 1.5</td><td class="pass">pass</td>' in good
    bad = page(stored(GOOD + BAD), GOOD + BAD)
    headline = re.search(r"<h1[^>]*>(.*?)</h1>", bad)[1]
    assert headline.startswith("NOT the same function: 2 of 5 claims failed: 2 float32, largest &lt;error&gt; (1.5004")
    assert "3 bfloat16, KL (nan, bound 1.2)" in headline
    assert bad.count('<td class="fail">FAIL</td>') == 2


def test_every_rung_of_the_ladder_is_in_the_table_or_named_with_its_command():
    tests = {path.stem for path in ROOT.glob("parity_tests/test_[0-9]*.py")}
    measured = {"1 float64", "2 float32", "3 bfloat16", "5 gradients", "7 training", "8 generation", "9 packing"}
    assert {f"test_{name.replace(' ', '_')}" for name in {*measured, *TESTS_ONLY}} == tests
    html = page(stored(GOOD), GOOD)
    for name in TESTS_ONLY:
        assert name in html
        assert f"parity_tests/test_{name.replace(' ', '_')}.py" in html
    few = page(stored(GOOD[:2], transformers=False), GOOD[:2])
    assert "Rung 8 generation compares with transformers, which is not installed" in few


def test_the_table_takes_its_place_between_the_markers_of_a_readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- parity:begin -->\nreplaced\n<!-- parity:end -->\nafter\n")
    write_readme(path, stored(GOOD), GOOD)
    text = path.read_text()
    assert text.startswith(
        "before\n<!-- parity:begin -->\nThe same function: all 3 claims on 3 rungs hold.\n\n| rung |"
    )
    assert "| 2 float32 | RMS error over transformers' | 0.84 <= 1.5 |" in text
    assert text.endswith("twin 1.0, transformers 1.0.\n<!-- parity:end -->\nafter\n")
    assert "replaced" not in text


@pytest.mark.slow
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


@pytest.mark.slow
def test_it_reports_every_rung_on_any_weights(dry_run):
    folder, _ = dry_run
    rungs = rungs_of(folder / "parity")
    assert {rung["rung"][0] for rung in rungs.values()} >= {*"1235789"}
    equal = ("logits, JAX against the twin", "gradients, worst tensor", "logits, JAX against transformers")
    assert all(rungs[claim]["passed"] for claim in equal)
    roundings = [rungs[f"what {kind} loses of the weights, RMS"] for kind in ("f16", "bf16", "q8_0")]
    assert all(rung["passed"] and rung["measured"] > 1e-4 for rung in roundings)
    assert all("perplexity" in rung["noise"] for rung in roundings)
    html = (folder / "parity/index.html").read_text()
    assert html.count("data:image/png;base64,") == 3
    assert "http" not in html, "the page asks for something from outside"


@pytest.mark.slow
def test_a_bug_fails_it_and_missing_transformers_is_said(tiny_weights, tmp_path):
    """Two claims in one run of a minute: transformers is missing, and the mutant swaps gate and up."""
    (tmp_path / "sitecustomize.py").write_text(HIDE_TRANSFORMERS)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = report(tiny_weights, tmp_path / "report", PYTHONPATH=path, SMOLLM_MUTANT="gate and up swapped")
    assert result.returncode == 1
    rungs, html = rungs_of(tmp_path / "report"), (tmp_path / "report/index.html").read_text()
    assert not rungs["logits, JAX against the twin"]["passed"]
    assert not rungs["loss of 10 float32 steps, JAX against the twin"]["passed"]
    assert "NOT the same function" in html
    assert "measuring transformers" not in result.stdout
    assert "logits, JAX against twin" in rungs
    assert "transformers is not installed" in html
