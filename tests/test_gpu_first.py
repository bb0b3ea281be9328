"""scripts/gpu_first.sh with fake programs: commands and results of its stages; a failed stage stops no other."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tyro

from benchmarks.options import check_flags
from scripts import benchmark
from scripts.profile_train import Flags as ProfileFlags
from smollm_jax.training.flags import TrainingFlags

ROOT = Path(__file__).parent.parent
FIRST = ["machine", "train", "speed", "remat-dots", "attention", "profile", "resume", "decode", "decode-loops"]
SECOND = ["machine", "batch-32", "unroll-1", "decode-hf", "weights", "parity", "long"]
FILES = ("first.json", "first.log", "first.md", "first-metrics.jsonl")
# In place of the interpreter: writes down what it is asked to run. A word that it finds in SAYS fails, one in HANGS
# stays for ever, deaf to a time limit; the summary and pip are run.
RECORDER = f"""#!{sys.executable} -IS
import json, os, signal, sys, time
line = " ".join(sys.argv[1:])
if sys.argv[1:3] in (["-m", "benchmarks.summary"], ["-m", "pip"]):
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
open(os.environ["RECORD"], "a").write(json.dumps([os.environ.get("XLA_FLAGS"), *sys.argv[1:]]) + "\\n")
if os.environ.get("HANGS", "no such word") in line:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
for each in os.environ.get("FAILS", "no such word").split(","):
    if each in line:
        print("out of luck")
        sys.exit(9)
"""
# In place of `timeout`: seconds for the command that hangs, none for the others, however busy the machine is.
SHORT = """#!/bin/sh
shift 2
case "$*" in *"--remat dots"*) exec /usr/bin/timeout --kill-after=1 1 "$@" ;; esac
exec "$@"
"""


@pytest.fixture
def rehearse(tmp_path):
    """Runs the script with that interpreter: what it ran, its folder of results, and the finished process."""
    (tmp_path / "python").write_text(RECORDER)
    (tmp_path / "python").chmod(0o755)

    def run(*arguments, python=tmp_path / "python", **variables):
        (tmp_path / "record").write_text("")
        places = {"OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work"), "RECORD": str(tmp_path / "record")}
        result = subprocess.run(
            ["bash", "scripts/gpu_first.sh", *arguments],
            cwd=ROOT,
            env=os.environ | places | {"PYTHON": str(python), "LIMIT": "9000"} | variables,  # however busy it is here
            capture_output=True,
            text=True,
            check=False,
        )
        return [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()], tmp_path / "out", result

    return run


def ended(out: Path, name: str = "first") -> dict[str, int]:
    stages = json.loads((out / f"{name}.json").read_text())["stages"]
    return {row["stage"]: row["exit_status"] for row in stages if row["stage"] != "wheels"}


def test_the_first_call_asks_the_most_valuable_first_and_names_the_second(rehearse):
    calls, out, result = rehearse()
    assert result.returncode == 0, result.stderr
    assert ended(out) == dict.fromkeys(FIRST, 0)
    assert {path.name for path in out.iterdir()} == {*FILES[:3]}  # the recorder trains nothing
    assert "PART=second bash scripts/gpu_first.sh" in result.stdout.splitlines()[-1]
    assert "PART=second bash scripts/gpu_first.sh" in (out / "first.md").read_text()
    summary = json.loads((out / "first.json").read_text())
    assert summary["command"] == "PART=first bash scripts/gpu_first.sh"
    assert all(row["command"] for row in summary["stages"])
    flags = [(variables, Path(script).name, arguments) for variables, script, *arguments in calls]
    trained = [
        tyro.cli(TrainingFlags, args=arguments) for _, script, arguments in flags if script.endswith("train_jax.py")
    ]
    cold, resumed = trained
    assert (cold.steps, cold.batch_size, cold.sequence_length, cold.dtype) == (30, 16, 2048, "bfloat16")
    assert (cold.eval_every, cold.save_every, cold.resume, resumed.resume, resumed.steps) == (30, 30, False, True, 35)
    measured = [
        (variables, tyro.cli(benchmark.Flags, args=arguments))
        for variables, name, arguments in flags
        if name == "benchmark.py"
    ]
    for _, workload in measured:
        check_flags(workload)
    (_, speed), (_, dots), (plain, decode), (loops, again) = measured
    assert (speed.what, speed.batch_size, speed.sequence_length, speed.baselines) == (
        "train",
        16,
        2048,
        ("hf-compile",),
    )
    assert (dots.remat, dots.baselines) == ("dots", ())
    assert decode.what == again.what == "decode"
    assert "WHILE" not in (plain or "")
    assert loops.split()[-1] == "--xla_gpu_enable_command_buffer=+WHILE"
    (profiled,) = [
        tyro.cli(ProfileFlags, args=arguments) for _, script, arguments in flags if script.endswith("profile_train.py")
    ]
    assert (profiled.batch_size, profiled.sequence_length) == (16, 2048)


def test_the_second_call_is_of_flags_that_exist_too_and_some_stages_can_be_had_alone(rehearse):
    calls, out, result = rehearse(PART="second")
    assert result.returncode == 0, result.stderr
    assert ended(out, "second") == dict.fromkeys(SECOND, 0)
    flags = [
        tyro.cli(benchmark.Flags, args=arguments) for _, script, *arguments in calls if script.endswith("benchmark.py")
    ]
    for workload in flags:
        check_flags(workload)
    trained = [(workload.what, workload.batch_size, workload.unroll) for workload in flags[:2]]
    assert trained == [("train", 32, None), ("train", 16, 1)]
    assert (flags[-1].sequence_length, flags[-1].baselines) == (8192, ("hf-compile",))
    calls, out, _ = rehearse(STAGES="speed profile")
    assert ended(out, "first-again") == dict.fromkeys(["machine", "speed", "profile"], 0)
    assert ended(out, "second") == dict.fromkeys(SECOND, 0)
    assert json.loads((out / "first-again.json").read_text())["command"].startswith("STAGES='speed profile' ")


def test_a_stage_that_fails_or_hangs_loses_itself_only(rehearse, tmp_path):
    (tmp_path / "timeout").write_text(SHORT)
    (tmp_path / "timeout").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    _, out, result = rehearse(PATH=path, FAILS="--against hf-compile,--instructions", HANGS="--remat dots")
    statuses = {"speed": 9, "remat-dots": 137, "profile": 9}
    assert ended(out) == dict.fromkeys(FIRST, 0) | statuses
    assert result.returncode == 1
    assert "failed: speed, remat-dots, profile" in result.stdout
    assert "out of luck" in (out / "first.log").read_text()


@pytest.mark.slow
def test_all_of_it_ends_at_the_limit_and_says_what_was_left_out(rehearse):
    _, out, _ = rehearse(HANGS="train_jax.py", LIMIT="20")
    assert ended(out) == {"machine": 0, "train": 137} | dict.fromkeys(FIRST[2:], 124)
    assert sum(row["seconds"] for row in json.loads((out / "first.json").read_text())["stages"]) <= 20


def test_a_training_that_fails_is_tried_without_cudnn(rehearse):
    calls, out, _ = rehearse(FAILS="--attention xla,train_jax.py")
    assert [name for name in ended(out) if name.startswith("train")] == ["train", "train-xla"]
    assert calls[2][-2:] == ["--attention", "xla"]


@pytest.mark.parametrize(
    ("arguments", "part", "message"),
    [
        (["--dryrun"], "first", "--dryrun: the only argument is --dry-run\n"),
        ([], "third", "PART=third: must be first or second\n"),
    ],
)
def test_it_refuses_what_it_cannot_do(rehearse, arguments, part, message):
    calls, _, result = rehearse(*arguments, PART=part)
    assert (calls, result.returncode, result.stderr) == ([], 2, message)


def test_wheels_beside_the_tree_are_installed_where_every_stage_finds_them(rehearse, tmp_path):
    wheels = ROOT / ".whl"
    mine = wheels / "smollm_rehearsal-1.0-py3-none-any.whl"
    wheels.mkdir(exist_ok=True)
    with zipfile.ZipFile(mine, "w") as wheel:
        dist_info = "smollm_rehearsal-1.0.dist-info"
        wheel.writestr("smollm_rehearsal.py", "FOUND = 1\n")
        wheel.writestr(f"{dist_info}/METADATA", "Metadata-Version: 2.1\nName: smollm_rehearsal\nVersion: 1.0\n")
        wheel.writestr(f"{dist_info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{dist_info}/RECORD", "")
    try:
        (tmp_path / "finder").write_text(
            f"#!{sys.executable}\nimport os, sys\nif sys.argv[1] != '-m':\n"
            "    import smollm_rehearsal\n    sys.exit(smollm_rehearsal.FOUND - 1)\n"
            "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
        )
        (tmp_path / "finder").chmod(0o755)
        _, out, result = rehearse(python=tmp_path / "finder", STAGES="speed")
    finally:
        mine.unlink()
        if not any(wheels.iterdir()):
            wheels.rmdir()
    assert ended(out, "first-again") == {"machine": 0, "speed": 0}, result.stdout
    assert (tmp_path / "work/site/smollm_rehearsal.py").exists()


@pytest.mark.overnight
@pytest.mark.torch
def test_every_stage_runs_at_toy_size_on_the_cpu(rehearse):
    """Both calls write into one folder, at most eight result files."""
    _, out, result = rehearse("--dry-run", python=sys.executable)
    assert ended(out) == dict.fromkeys(FIRST, 0), result.stdout
    summary = json.loads((out / "first.json").read_text())
    assert summary["machine"]["device"] == "cpu"
    assert summary["machine"]["versions"]["jax"]
    assert {"speed", "remat-dots", "decode", "decode-loops"} == {*summary["rows"]}
    assert all(row["passed"] for row in summary["others"]["attention"]["rows"])
    steps = [json.loads(line) for line in (out / "first-metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in steps) == 9  # 4, and 5 more after the resume
    _, out, result = rehearse("--dry-run", python=sys.executable, PART="second")
    failed = {name: status for name, status in ended(out, "second").items() if status}
    assert failed in ({}, {"parity": 1}), result.stdout  # random weights: the report may say so, having run
    assert {path.name for path in out.iterdir()} == {*FILES, "second.json", "second.log", "second.md"}
