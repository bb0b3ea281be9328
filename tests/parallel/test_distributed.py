"""Several processes train one run over loopback: they match one process, stop and fail together, and resume."""

import contextlib
import json
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from smollm_jax.runs.checkpoint import steps_in
from smollm_jax.runs.metrics import read_metrics
from tests.trainer import ENVIRONMENT, command, refused, rows, train

SMALL = ("--steps", "20", "--batch-size", "4", "--sequence-length", "32", "--eval-every", "0")
# AdamW's first steps make much of a rounding error in a small gradient, in proportion to the rate: at the other tests'
# 3e-3 the losses of one and two processes part by 2e-4 in 20 steps, at 3e-4 by 1.6e-5.
SMALL += ("--learning-rate", "1e-4", "--warmup-steps", "2", "--dtype", "float32")


def free_port() -> int:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def launch():
    """Starts a run's processes, each with one device, and kills those still running after the test."""
    launched: list[subprocess.Popen] = []

    def start(run: Path, count: int, *flags: str) -> list[subprocess.Popen]:
        launched.extend(processes := peers(run, count, *flags))
        return processes

    yield start
    for process in launched:
        process.kill()


def peers(run: Path, count: int, *flags: str) -> list[subprocess.Popen]:
    distributed = ("--distributed", "--coordinator-address", f"127.0.0.1:{free_port()}", "--num-processes", str(count))
    resume = ("--resume",) if steps_in(run / "checkpoints") else ()
    options = {"cwd": run.parent, "env": ENVIRONMENT, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    return [
        subprocess.Popen([*command(run, *flags, *distributed, "--process-id", str(i)), *resume], text=True, **options)
        for i in range(count)
    ]


def results_of(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """The exit code, stdout and stderr of each process."""
    outputs = [process.communicate(timeout=600) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, outputs, strict=True)]


def wait_for(condition, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert all(process.poll() is None for process in processes), results_of(processes)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def losses(run: Path) -> np.ndarray:
    return np.array([row["loss"] for row in read_metrics(run) if "loss" in row])


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "alone"
    done = train(run, *SMALL)
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.slow
def test_documents_are_masked_where_that_is_asked_for(tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Text {n} tells of {n * n} things."}) + "\n" for n in range(400)))
    for name, flags in {"masked": ("--mask-documents",), "plain": ()}.items():
        done = train(tmp_path / name, *SMALL, "--steps", "3", *flags, data=texts)
        assert done.returncode == 0, done.stderr
    assert abs(losses(tmp_path / "masked")[0] - losses(tmp_path / "plain")[0]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mesh"), [(2, "fsdp=2"), (4, "data=2,fsdp=2")])
def test_processes_learn_what_one_does_and_any_number_resumes(tmp_path, alone, launch, count, mesh):
    run = tmp_path / "run"
    flags = (*SMALL, "--mesh", mesh, "--save-every", "10", "--gradient-accumulation-steps", "1")
    results = results_of(launch(run, count, *flags))
    assert [code for code, _, _ in results] == [0] * count, results
    np.testing.assert_allclose(losses(run), losses(alone), rtol=1e-5)
    norms = ([row["gradient_norm"] for row in rows(folder)] for folder in (run, alone))
    np.testing.assert_allclose(*norms, rtol=1e-5)  # a wrong shard of one gradient would change them
    assert f"{count} of {count} as {mesh}, {count} processes" in results[0][1]
    assert not any("step" in out for _, out, _ in results[1:]), "only the main process prints"
    resumed = train(run, *SMALL, "--resume", "--steps", "22")  # by one process
    assert resumed.returncode == 0, resumed.stderr
    assert f"devices {count} -> 1" in resumed.stdout
    assert steps_in(run / "checkpoints") == [20, 22]


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_the_loss_of_one_ends_all_and_both_resume(tmp_path, launch):
    run = tmp_path / "run"
    endless = (*SMALL, "--steps", "100000", "--save-every", "1000")
    processes = launch(run, 2, *endless)
    wait_for(lambda: len(rows(run)) > 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    results = results_of(processes)
    assert [code for code, _, _ in results] == [75, 75], results
    (stopped,) = steps_in(run / "checkpoints")
    assert all(f"step {stopped} of 100000 is saved and verified" in errors for _, _, errors in results)
    processes = launch(run, 2, *endless, "--save-every", "2")
    wait_for(lambda: steps_in(run / "checkpoints")[-1] >= stopped + 4, processes)
    processes[1].kill()
    (code, _, errors), _ = results_of(processes)
    assert code == 8, errors
    assert "another process of this run is gone" in errors.splitlines()[-1]
    last = steps_in(run / "checkpoints")[-1]
    results = results_of(launch(run, 2, *SMALL, "--steps", str(last + 2)))
    assert [code for code, _, _ in results] == [0, 0], results
    assert f"resumed from step {last}" in results[0][1]
    assert steps_in(run / "checkpoints")[-1] == last + 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--distributed", "--async-save"), "cannot be used with --async-save"),
        (("--process-id", "1"), "--process-id needs --distributed"),
        (("--mesh", "data=2"), "--mesh data=2: describes 2 devices, but JAX sees 1"),
        (("--batch-size", "3", "--gradient-accumulation-steps", "2"), "must divide batch_size 3"),
    ],
)
def test_invalid_flags_are_refused(tmp_path, flags, message):
    refusal = refused(tmp_path / "run", *flags)
    assert refusal.exit_code == 2
    assert message in str(refusal)


def test_processes_without_addresses_give_one_line(tmp_path):
    done = train(tmp_path / "run", "--distributed")
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    assert "elsewhere give --coordinator-address, --num-processes and --process-id" in done.stderr
