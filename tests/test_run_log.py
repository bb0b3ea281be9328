"""A run's log: step 0, and the note on training that makes weights worse."""

from pathlib import Path

import pytest

from smollm_jax.metrics import RunLog, read_metrics
from smollm_jax.web.runs import RunLog as PageLog

def log_of(run: Path, **options) -> RunLog:
    return RunLog(run, log_every=100, flops_per_token=1.0, peak_flops=None, **options)


def write(log: RunLog, losses: dict[int, float], steps: int = 9) -> None:
    """Validations at some steps, each but step 0's after its training step."""
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
    page = PageLog(tmp_path / "metrics.jsonl")
    page.look()
    assert page.fault == ""
    assert page.curves["validation_loss"] == [(0, 3.0), (1, 2.9)]
