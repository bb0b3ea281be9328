"""What the page shows of names, progress and faults is text: whoever names a folder of weights writes no HTML."""

import re
from pathlib import Path

import gradio
import pytest

from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.web.events import error_html, errors_in_toast, progress_html
from smollm_jax.web.model_store import ModelStore
from smollm_jax.web.responses import Handlers
from tests.serving import GREEDY

HOSTILE = '<img src=x onerror="alert(1)">&'
SHOWN = "&lt;img src=x onerror="


def handlers(folder: Path) -> Handlers:
    store = ModelStore(initial_weights=None, assets=folder / "assets", runs=folder / "runs", fetch=["false"])
    return Handlers(store, device=f"device {HOSTILE}", time_limit=60)


def tags(shown: str) -> set[str]:
    return set(re.findall(r"<(\w+)", shown))


def test_the_status_line_shows_a_name_a_title_and_a_device_as_text(tmp_path):
    for status in (handlers(tmp_path).status(HOSTILE), handlers(tmp_path).status("x", title=HOSTILE)):
        assert tags(status) == {"span", "b"}
        assert status.count(SHOWN) == 2


def test_progress_and_faults_are_shown_as_text():
    for shown in (progress_html(f"{HOSTILE}: loading"), error_html(InputFileError(f"{HOSTILE}: is damaged"))):
        assert tags(shown) <= {"p", "i", "b"}
        assert shown.count(SHOWN) == 1

    def fails() -> None:
        raise UsageError(f"{HOSTILE}: no such run")

    with pytest.raises(gradio.Error) as raised:
        errors_in_toast(fails)()
    assert tags(raised.value.message) == set()
    assert SHOWN in raised.value.message


def test_a_checkpoint_that_cannot_be_read_and_its_runs_name_are_shown_as_text(tmp_path):
    run = tmp_path / "runs" / HOSTILE
    (run / "checkpoints/3").mkdir(parents=True)
    *_, last = handlers(tmp_path).compare(run.name, [3], f"a {HOSTILE}", GREEDY, "")
    assert 'class="fault"' in last.content
    assert tags(last.content) == {"div", "h4", "span", "p"}
    assert last.content.count(SHOWN) >= 2, "of the prompt, and of the fault, which names the folder"
