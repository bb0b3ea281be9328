"""Trainings for the tests, of the tiny model on some of the real text, in this process or in one of their own.

With `train_here`, JAX is imported once, and a step of the same recipe is traced and compiled once. What is about a
process, its signals, its exit or its death, needs one. Processes have a compilation cache of their own,
because one that is killed leaves what it was writing, of which JAX warns whoever reads it. Text is prepared once for
all, and every sixteenth speech is enough: all 249 take longer than a training.
"""

import atexit
import contextlib
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from smollm_jax.commands import train as train_command
from smollm_jax.config import Config, Recipe
from smollm_jax.errors import SmolLMError
from smollm_jax.runs.checkpoint import CheckpointStore, steps_in
from smollm_jax.runs.metrics import RunLog, read_metrics
from smollm_jax.runtime import allocator, compilation_cache
from smollm_jax.runtime.signals import StopSignal
from smollm_jax.training import train_step
from smollm_jax.training.execution import ExecutionConfig

COMPILE_STEP = train_step.compile_step
ROOT = Path(__file__).parent.parent
PREPARED, TEXT = (tempfile.mkdtemp(prefix="smollm-tests-") for _ in range(2))
for folder in (PREPARED, TEXT):
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
# The processes of a worker have a cache of their own, for a kill may leave a broken entry in it. It has links to the
# session's programs.
PROGRAMS = os.environ["JAX_COMPILATION_CACHE_DIR"]
CACHE = f"{PROGRAMS}-trainers-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"
os.makedirs(CACHE, exist_ok=True)
compilation_cache.remove_broken(Path(CACHE))
LINKED: set[str] = set()
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    "JAX_COMPILATION_CACHE_DIR": CACHE,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


class KilledError(Exception):
    """Stands for a kill: nothing more is written."""


def speeches() -> Path:
    """The folder of speeches that the tests train on."""
    if not os.listdir(TEXT):
        for speech in sorted((ROOT / "assets/sotu").glob("*.txt"))[::16]:
            shutil.copy(speech, TEXT)
    return Path(TEXT)


def share_programs() -> None:
    """Gives the processes what this one and the other worker have compiled."""
    for name in {name for name in os.listdir(PROGRAMS) if name.endswith("-cache")} - LINKED:
        with contextlib.suppress(FileExistsError):
            os.link(f"{PROGRAMS}/{name}", f"{CACHE}/{name}")
        LINKED.add(name)


def command(run: Path, *flags: str, preset: str | None = "tiny", data: Path | None = None) -> list[str]:
    share_programs()
    if run.parent.is_dir() and not (run.parent / "data").exists():
        with contextlib.suppress(OSError):  # where there can be none, the trainer is to say so
            (run.parent / "data").symlink_to(PREPARED)  # it keeps prepared text in the folder it works in
    small = {"tiny": ["--preset", preset, "--sequence-length", "64"], None: []}.get(preset, ["--preset", preset])
    script = [sys.executable, str(ROOT / "scripts/train_jax.py"), "--out", str(run), *small]
    tokenizer = ["--tokenizer", str(ROOT / "assets/tokenizer"), "--data", str(data or speeches())]
    return [*script, *tokenizer, "--learning-rate", "3e-3", *flags]


def train(run: Path, *flags: str, prefix: tuple[str, ...] = (), **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*prefix, *command(run, *flags, **options)],
        capture_output=True,
        text=True,
        check=False,
        cwd=run.parent if run.parent.is_dir() else None,
        env=ENVIRONMENT,
    )


@functools.cache
def _compiled(config: Config, recipe: Recipe, execution: ExecutionConfig) -> Any:
    return COMPILE_STEP(config, recipe, execution)


@contextlib.contextmanager
def this_process(folder: Path) -> Iterator[None]:
    """The command that trains works in `folder`, and leaves this process's signals, allocator and precision alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train_command, "QuickStart", lambda **_: SimpleNamespace(end=lambda: None))
        patch.setattr(StopSignal, "install", lambda self: self)
        patch.setattr(StopSignal, "ignore", lambda self: None)
        patch.setattr(allocator, "retain_freed_memory", lambda: False)
        patch.setattr(allocator, "restore_defaults", lambda: None)
        patch.setattr(train_step, "compile_step", _compiled)
        precision = jax.config.jax_default_matmul_precision
        try:
            yield
        finally:
            jax.config.update("jax_default_matmul_precision", precision)


def train_here(run: Path, *flags: str, dies_after: int | None = None, **options) -> subprocess.CompletedProcess:
    """A training in this process, with the exit code that its error has.

    `dies_after`: nothing is written after the log of this step, as after a kill, and the exit code is -9.
    """
    _, _, *arguments = command(run, *flags, **options)
    out, errors, code = io.StringIO(), io.StringIO(), 0
    log = RunLog.step

    def step(self, number: int, **values: Any) -> None:
        log(self, number, **values)
        if number == dies_after:
            raise KilledError

    with contextlib.ExitStack() as stack:
        stack.enter_context(this_process(run.parent))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(errors))
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(RunLog, "step", step)
        try:
            train_command.main(arguments)
        except SmolLMError as error:
            print(f"error: {error}", file=errors)
            code = error.exit_code
        except KilledError:
            code = -signal.SIGKILL
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def refused(run: Path, *flags: str, **options) -> SmolLMError:
    """The error of a training that cannot start.

    What a process makes of it, one line and an exit code, is `run_main`'s: see tests/commands/test_scripts.py.
    """
    _, _, *given = command(run, *flags, **options)
    with this_process(run.parent), pytest.raises(SmolLMError) as caught:
        train_command.main(given)
    assert "\n" not in str(caught.value)
    return caught.value


def start(run: Path, *flags: str, **options) -> subprocess.Popen:
    """A training under way; goes on with the run if it has a checkpoint, as `make train` does."""
    resume = ["--resume"] if steps_in(run / "checkpoints") else []
    return subprocess.Popen(
        command(run, *flags, *resume, **options),
        cwd=run.parent,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rows(run: Path) -> list[dict]:
    """Every step row as written, repeated steps too, whole lines only."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    parsed = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in parsed if "loss" in row]


def losses(run: Path) -> list[str]:
    """Each step's loss as a hex float: equal means the same bits."""
    return [float(row["loss"]).hex() for row in read_metrics(run) if "loss" in row]


def final_state(run: Path) -> dict[str, bytes]:
    with CheckpointStore(run / "checkpoints", create=False) as store:
        step = store.latest_step()
        store.verify(step)
        items = {item: store.read(step, item) for item in ("params", "optimizer")}
    return {f"{item}.{name}": array.tobytes() for item, arrays in items.items() for name, array in arrays.items()}
