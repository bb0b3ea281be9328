"""scripts/gpu_suite.sh without a GPU: its stages, their flags, its time limits and tables."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from benchmarks.options import check_flags
from scripts import benchmark

ROOT = Path(__file__).parent.parent
# In place of the interpreter: writes down what it is asked to run, and runs the summary alone.
RECORDER = f"""#!{sys.executable}
import json, os, sys
if sys.argv[1:3] in (["-m", "benchmarks.summary"], ["-m", "benchmarks.room"]):
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
open(os.environ["RECORD"], "a").write(json.dumps(sys.argv[1:]) + "\\n")
"""
SMI = """#!/bin/sh
case $* in *memory.total*) echo "$MEMORY_MIB" ;; *) echo No GPU of this world ;; esac
"""


def suite(folder, *arguments, **variables):
    return subprocess.run(
        ["bash", "scripts/gpu_suite.sh", *arguments],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def on_a_gpu(tmp_path):
    """Runs the suite with a fake `nvidia-smi`; returns the commands that it ran, and its summary."""
    for name, text in (("nvidia-smi", SMI), ("recorder", RECORDER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(**variables):
        record = tmp_path / "record"
        record.write_text("")
        suite(tmp_path, PYTHON=str(tmp_path / "recorder"), RECORD=str(record), **variables)
        (folder,) = ROOT.glob("benchmarks/results/no-gpu-of-this-world-*")
        summary = json.loads((folder / "summary.json").read_text())
        shutil.rmtree(folder)
        return [json.loads(line) for line in record.read_text().splitlines()], summary

    yield run
    for file in ROOT.glob("benchmarks/results/no-gpu-of-this-world-*"):
        shutil.rmtree(file)


def test_every_benchmark_of_the_gpu_suite_has_flags_that_exist(on_a_gpu):
    calls, summary = on_a_gpu()
    assert all(row["exit_status"] == 0 for row in summary["stages"])
    assert summary["command"] == "bash scripts/gpu_suite.sh"
    flags = []
    for script, *arguments in calls:
        if script == "scripts/benchmark.py":
            flags.append(tyro.cli(benchmark.Flags, args=arguments))
            check_flags(flags[-1])
    measured = {(each.what, each.sequence_length, name) for each in flags for name in ("ours", *each.baselines)}
    for name in ("ours", "hf-compile", "hf-compile-max", "twin-compile"):
        assert ("train", 2048, name) in measured
    assert {("train", 8192, "hf-compile"), ("memory", 2048, "hf-compile"), ("loss", 2048, "hf-compile")} < measured
    trained = [each for each in flags if each.what == "train"]
    for length in (2048, 8192):
        assert len({each.batch_size for each in trained if each.sequence_length == length}) == 3
        assert len({each.unroll for each in trained if each.sequence_length == length}) >= 2
    decoded = {each.batch_size: each.baselines for each in flags if each.what == "decode"}
    assert decoded == {1: ("hf", "hf-compile"), 64: ("hf", "hf-compile")}
    assert {"gemm", "attention", "packed", "startup"} < {each.what for each in flags}


def test_no_part_of_the_suite_takes_more_than_ten_minutes_and_all_end_at_the_limit(on_a_gpu):
    limits = {}
    for line in (ROOT / "scripts/gpu_suite.sh").read_text().splitlines():
        if line.startswith("if [") and '= all ] || [ "$part"' in line:
            limits[line] = []
        elif line.startswith(("    stage ", "    benchmark ")) and limits and "speed-1 " not in line:  # of the dry run
            limits[[*limits][-1]].append(int(line.split()[2]))
    limits = {part: seconds for part, seconds in limits.items() if seconds}
    assert len(limits) == 4
    assert all(sum(seconds) < 600 for seconds in limits.values()), limits
    calls, summary = on_a_gpu(LIMIT="0")
    assert calls == []
    assert {row["exit_status"] for row in summary["stages"]} == {124}
    assert len(summary["stages"]) == sum(map(len, limits.values()))


@pytest.mark.parametrize(
    ("arguments", "part", "message"),
    [
        (["--dry-run"], "sped", "PART=sped: must be correctness, speed, kernels, sweep or unset\n"),
        (["--dryrun"], "speed", "--dryrun: the only argument is --dry-run\n"),
        ([], "speed", "no GPU: nvidia-smi lists none; --dry-run works without one\n"),
    ],
)
def test_the_suite_refuses_what_it_cannot_do(tmp_path, arguments, part, message):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    result = suite(tmp_path, *arguments, PART=part)
    assert (result.returncode, result.stderr) == (2, message)


@pytest.mark.slow
def test_what_does_not_fit_is_skipped_and_reported(on_a_gpu):
    """81,559 MiB are an H100's: 16 sequences of both backends fit there, 32 do not."""
    calls, summary = on_a_gpu(PART="speed", MEMORY_MIB="81559")
    assert [row["stage"] for row in summary["stages"]] == ["speed-16", "speed-16-max", "speed-16-twin", "speed-8"]
    assert len(calls) == 4
    (message,) = summary["left_out"]
    assert message.startswith("speed-32 skipped: estimated memory of ")
    assert message.endswith("for hf-compile exceeds 90% of 86 GB; --batch-size 16 fits")


@pytest.mark.parametrize(
    ("gigabytes", "arguments", "status"),
    [
        (85.5, "train --batch-size 32 --against hf-compile", 3),
        (150.7, "train --batch-size 32 --against hf-compile", 0),  # an H200
        (85.5, "train --batch-size 32 --remat none --against", 0),  # ours alone
        (25.3, "train --batch-size 32 --remat none --against", 3),
        (25.3, "train --batch-size 4 --against hf-compile", 0),  # an RTX 4090
        (25.3, "train --batch-size 8 --against hf-compile", 3),
        (25.3, "memory --batch-size 8 --against hf-compile", 0),  # one after the other
        (55.0, "train --batch-size 16 --against hf-compile", 3),
        (55.0, "train --batch-size 16 --against twin-compile", 0),  # holds no logits
    ],
)
def test_memory_is_estimated_for_all_backends_at_once(monkeypatch, gigabytes, arguments, status, capsys):
    from benchmarks import room

    assert room.main(gigabytes, [*arguments.split(), "--dtype", "bfloat16", "--sequence-length", "2048"]) == status
    assert ("estimated memory of " in capsys.readouterr().out) is (status == 3)


def measured_stage(folder, stage, **medians):
    rows = {f"tokens/s, {name}": {"median": x, "min": x, "max": x} for name, x in medians.items()}
    (folder / f"{stage}.json").write_text(json.dumps({"rows": rows}))
    return f"{stage}\t0\t1\tx\n"


def test_the_suites_summary_divides_best_by_best(tmp_path, monkeypatch, capsys):
    """Each backend at its own best batch size; other shapes and failed stages are excluded."""
    from benchmarks import summary

    stages = [
        measured_stage(tmp_path, "speed-8", ours=100.0, **{"hf-compile": 90.0}),
        measured_stage(tmp_path, "speed-16", ours=120.0, **{"hf-compile": 60.0}),
        measured_stage(tmp_path, "speed-16-max", ours=110.0, **{"hf-compile-max": 100.0}),
        measured_stage(tmp_path, "long", ours=999.0, **{"hf-compile": 1.0}),
        "speed-32\t124\t9\tx\n",
    ]
    (tmp_path / "stages.tsv").write_text("".join(stages))
    rung = {"rung": "2 float32", "claim": "RMS error", "measured": 0.5, "bound": 1.5, "passed": False}
    (tmp_path / "parity").mkdir()
    (tmp_path / "parity/report.json").write_text(json.dumps({"rungs": [rung]}))
    assert summary.main(tmp_path, "bash x") == 1
    assert "4 of 5 stages finished" in (output := capsys.readouterr().out)
    assert "failed: speed-32" in output
    best = json.loads((tmp_path / "summary.json").read_text())["best_over_best"]
    assert {name: (x["ratio"], x["ours"]["stage"], x["other"]["stage"]) for name, x in best.items()} == {
        "hf-compile": (120 / 90, "speed-16", "speed-8"),
        "hf-compile-max": (1.2, "speed-16", "speed-16-max"),
        "hf at its best": (1.2, "speed-16", "speed-16-max, hf-compile-max"),
    }
    table = (tmp_path / "table.md").read_text()
    assert "| tokens/s, ours / hf at its best | 1.200 | 120 (speed-16) | 100 (speed-16-max, hf-compile-max) |" in table
    assert "| long | tokens/s, ours | 999 | 999 to 999 |" in table
    assert "| speed-32 | 124 | 9 | `x` |" in table
    assert "| 2 float32: RMS error | 5.00e-01 | 1.5e+00 | FAIL |" in table


@pytest.mark.parametrize(
    ("losses", "code", "message"),
    [
        ([4.0, 3.0], 0, "pass  2 losses differ by at most 0.0e+00"),
        ([4.0, 3.1], 1, "FAIL  2 losses differ by at most 3.2e-02"),
        ([4.0, float("nan")], 1, "FAIL"),
        ([4.0], 3, "has 1 steps, but --steps is 2"),
    ],
)
def test_two_runs_curves_are_compared_step_by_step(tmp_path, losses, code, message):
    for name, curve in (("a", [4.0, 3.0]), ("b", losses)):
        (tmp_path / name).mkdir()
        rows = [{"step": i, "loss": x} for i, x in enumerate(curve, 1)] + [{"step": 2, "validation_loss": 9.0}]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-m", "benchmarks.check_curves", "a", "b", "--steps", "2", "--bound", "0.02"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*map(str, command), "--out", "c.json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == code
    assert message in result.stdout + result.stderr
