"""Real training processes for the tests: the tiny model, the real text, a compilation cache of their own.

Of their own, because one that is killed leaves what it was writing, of which JAX warns whoever reads it. Text is
prepared once for all of them: for each alone it would take longer than its training.
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

from smollm_jax.runs.checkpoint import CheckpointStore, steps_in
from smollm_jax.runs.metrics import read_metrics

ROOT = Path(__file__).parent.parent
CACHE, PREPARED = (tempfile.mkdtemp(prefix="smollm-tests-") for _ in range(2))
for folder in (CACHE, PREPARED):
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    "JAX_COMPILATION_CACHE_DIR": CACHE,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def command(run: Path, *flags: str, preset: str | None = "tiny", data: Path = ROOT / "assets/sotu") -> list[str]:
    if run.parent.is_dir() and not (run.parent / "data").exists():
        with contextlib.suppress(OSError):  # where there can be none, the trainer is to say so
            (run.parent / "data").symlink_to(PREPARED)  # it keeps prepared text in the folder it works in
    small = {"tiny": ["--preset", preset, "--sequence-length", "64"], None: []}.get(preset, ["--preset", preset])
    script = [sys.executable, str(ROOT / "scripts/train_jax.py"), "--out", str(run), *small]
    tokenizer = ["--tokenizer", str(ROOT / "assets/tokenizer"), "--data", str(data)]
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
