"""A run's log: step 0, the warning about training that makes weights worse, and metrics sent to a tracking service."""

import json
import sys
from pathlib import Path

import pytest

from smollm_jax.errors import StoppedError, UsageError
from smollm_jax.runs import tracking
from smollm_jax.runs.metrics import RunLog, read_metrics
from smollm_jax.web.run_curves import RunCurves

# Stands for a service's package: it writes down each call, in the order it came.
RECORDING = """
import json, os, types
def told(**call):
    with open(os.environ["TRACKED"], "a") as file:
        file.write(json.dumps(call) + "\\n")
class Run:
    def define_metric(self, *names, **options): told(define=names, **options)
    def log(self, row, **options):
        if os.environ.get("TRACKER_FAILS") == "log":
            raise ConnectionError("the service has gone\\nand more")
        told(row=row, **options)
    def finish(self, **options): told(finish=options)
def init(**options):
    if os.environ.get("TRACKER_FAILS") == "init":
        raise RuntimeError("api_key not configured (no-tty)\\nand more")
    options.pop("settings", None)
    told(init=options)
    return Run()
Settings = lambda **options: options
finish = lambda: told(finish={})
"""


@pytest.fixture
def service(tmp_path, monkeypatch):
    """The name of a tracking service with a fake package that records into `tracked()`."""
    (tmp_path / "packages").mkdir()
    for name in ("wandb", "trackio"):
        (tmp_path / f"packages/{name}.py").write_text(RECORDING)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("TRACKED", str(tmp_path / "tracked"))
    return lambda: [json.loads(line) for line in (tmp_path / "tracked").read_text().splitlines()]


def log_of(run: Path, **options) -> RunLog:
    return RunLog(run, log_every=100, flops_per_token=1.0, peak_flops=None, **options)


def write(log: RunLog, losses: dict[int, float], steps: int = 9) -> None:
    """Writes validations at some steps, each after its training step except that of step 0."""
    log.start(0, steps, 10)
    for step, loss in losses.items():
        if step:
            log.step(step, loss=loss, learning_rate=0.1, gradient_norm=1.0, input_seconds=0.0)
        log.validation(step, loss)


@pytest.mark.parametrize(
    ("losses", "notes"),
    [
        ({0: 3.0, 1: 2.9, 2: 2.8}, 0),
        ({0: 3.0, 1: 3.1, 2: 2.9, 3: 3.1, 4: 3.0}, 0),  # never twice in a row
        ({0: 3.0, 1: 3.1, 2: 3.2}, 1),
        ({0: 3.0, 1: 3.1, 2: 3.2, 3: 3.3, 4: 2.0, 5: 4.0, 6: 4.0, 9: 4.0}, 1),  # said once
        ({0: 3.0, 9: 3.1}, 1),  # the last one
        ({1: 3.0, 2: 3.1, 9: 3.2}, 0),  # from new parameters: there is no step 0
    ],
)
def test_training_that_makes_weights_worse_is_said_once(tmp_path, capsys, losses, notes):
    with log_of(tmp_path) as log:
        write(log, losses)
    text = capsys.readouterr().out
    assert text.count("above that of the weights this run started from") == notes
    assert text.count("lower --learning-rate") == notes


def test_a_resumed_run_knows_what_it_started_from(tmp_path, capsys):
    with log_of(tmp_path) as log:
        write(log, {0: 3.0, 1: 2.9})
    with log_of(tmp_path) as log:
        log.start(1, 9, 10)
        log.validation(2, 3.5)
        assert "above that" not in capsys.readouterr().out
        log.validation(3, 3.6)
    assert "(3.6000, 3.0000 at step 0)" in capsys.readouterr().out


def test_step_0_is_read_by_the_plots_and_by_the_page(tmp_path):
    with log_of(tmp_path) as log:
        write(log, {0: 3.0, 1: 2.9})
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 1]
    page = RunCurves(tmp_path / "metrics.jsonl")
    page.read_new_rows()
    assert page.error == ""
    assert page.curves["validation_loss"] == [(0, 3.0), (1, 2.9)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_the_numbers_of_metrics_jsonl_under_one_id(tmp_path, service, name):
    run = tmp_path / "run"
    run.mkdir()
    for resumed in (False, True):
        with log_of(run, tracker=tracking.Tracker(name, run, {"recipe": {"steps": 9}})) as log:
            write(log, {5: float("nan"), 6: 2.0} if resumed else {0: 3.0, 1: 2.9})
    calls = service()
    rows = [call["row"] | ({"step": call["step"]} if "step" in call else {}) for call in calls if "row" in call]
    in_file = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{key: value for key, value in row.items() if value is not None} for row in in_file]
    first, second = (call["init"] for call in calls if "init" in call)
    assert first == second, "a resumed run goes on under its name and id"
    assert first["config"] == {"recipe": {"steps": 9}}
    assert json.loads((run / "tracking.json").read_text())[name] in first.get("id", first["name"])
    assert sum("finish" in call for call in calls) == 2


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_that_fails_is_left_out_with_one_note(tmp_path, service, monkeypatch, capsys, name):
    with log_of(tmp_path, tracker=tracking.Tracker(name, tmp_path, {})) as log:
        monkeypatch.setenv("TRACKER_FAILS", "log")
        write(log, {0: 3.0, 1: 2.9})
    note = (
        f"note: --track {name} failed and is disabled for this run (the service has gone); metrics.jsonl has every row"
    )
    assert capsys.readouterr().out.count(note) == 1
    assert len(read_metrics(tmp_path)) == 3


@pytest.mark.parametrize(("error", "exit_code"), [(None, 0), (StoppedError("x"), 0), (ValueError("x"), 1)])
def test_wandb_shows_a_failed_run_as_failed(tmp_path, service, error, exit_code):
    try:
        with log_of(tmp_path, tracker=tracking.Tracker("wandb", tmp_path, {})):
            if error:
                raise error
    except ValueError:
        pass
    assert service()[-1] == {"finish": {"exit_code": exit_code}}


def test_a_service_that_does_not_start_is_one_line(tmp_path, service, monkeypatch):
    monkeypatch.setenv("TRACKER_FAILS", "init")
    with pytest.raises(UsageError) as raised:
        tracking.Tracker("wandb", tmp_path, {})
    line = "--track wandb: api_key not configured (no-tty); without an account or a network: WANDB_MODE=offline"
    assert str(raised.value) == line


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("sys.path", [])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(UsageError, match="--track trackio needs the package trackio: pip install trackio"):
        tracking.check_installed("trackio")
