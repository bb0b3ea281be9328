"""Real training processes for the tests: the tiny model, some of the real text, a compilation cache of their own.

Of their own, because one that is killed leaves what it was writing, of which JAX warns whoever reads it. Text is
prepared once for all of them, and every sixteenth speech is enough: all 249 take longer than a training.
"""

import atexit
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from smollm_jax.commands import train as train_command
from smollm_jax.errors import SmolLMError
from smollm_jax.runs.checkpoint import CheckpointStore, steps_in
from smollm_jax.runs.metrics import read_metrics
from smollm_jax.runtime import allocator
from smollm_jax.runtime.signals import StopSignal

ROOT = Path(__file__).parent.parent
CACHE, PREPARED, TEXT = (tempfile.mkdtemp(prefix="smollm-tests-") for _ in range(3))
for folder in (CACHE, PREPARED, TEXT):
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    "JAX_COMPILATION_CACHE_DIR": CACHE,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def speeches() -> Path:
    """The folder of speeches that the tests train on."""
    if not os.listdir(TEXT):
        for speech in sorted((ROOT / "assets/sotu").glob("*.txt"))[::16]:
            shutil.copy(speech, TEXT)
    return Path(TEXT)


def command(run: Path, *flags: str, preset: str | None = "tiny", data: Path | None = None) -> list[str]:
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


def refused(run: Path, *flags: str, **options) -> SmolLMError:
    """The error of a training that cannot start, in this process, which has JAX already.

    What a process makes of it, one line and an exit code, is `run_main`'s: see tests/commands/test_scripts.py.
    """
    _, _, *given = command(run, *flags, **options)
    with pytest.MonkeyPatch.context() as patch:  # of a process that lives on
        patch.chdir(run.parent)
        patch.setattr(train_command, "QuickStart", lambda **_: None)
        patch.setattr(StopSignal, "install", lambda self: self)
        patch.setattr(allocator, "retain_freed_memory", lambda: False)
        with pytest.raises(SmolLMError) as caught:
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
