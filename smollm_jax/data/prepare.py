"""Builds a data set from a plan: distributes work units over processes and resumes an interrupted build.

Each token file depends on the plan alone, so the number of processes and any interruption leave its bytes unchanged.
"""

import collections
import dataclasses
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from smollm_jax import errors
from smollm_jax.data.plan import DEFAULTS, BuildPlan, Settings, make_plan
from smollm_jax.data.prepare_worker import Job, WorkUnit, tokenize_unit
from smollm_jax.data.text_counts import sentences
from smollm_jax.data.token_file import MANIFEST, MAX_MANIFEST, write_manifest
from smollm_jax.errors import InputFileError, LockedError, SmolLMError, StoppedError, UsageError, short_repr
from smollm_jax.runtime.atomic import replacing
from smollm_jax.runtime.files import read_json
from smollm_jax.runtime.lock import FILE as LOCK
from smollm_jax.runtime.lock import RunLock
from smollm_jax.runtime.signals import SIGNALS, StopSignal
from smollm_jax.tokenizer import Tokenizer

PLAN = "plan.json"
# Tokenizer threads per process. They share its vocabulary; two processes hold two copies of it in the CPU cache.
THREADS = 4
REPORT_SECONDS = 10  # between progress lines when stdout is not a terminal


def cached_dataset(
    source: Path, settings: Settings, cache: Path, stop: StopSignal | None, tokenizer: Tokenizer
) -> Path:
    """The folder under `cache` with a source's tokens, built if missing and named by the hash of its content.

    When several processes ask for it at once, one builds it and the others wait. Prints what the source leaves out.
    """
    plan = make_plan([source], settings, by_content=True, tokenizer=tokenizer)
    print(*plan.notes, sep="\n", end="\n" * bool(plan.notes), flush=True)
    digest = hashlib.sha256(json.dumps(plan.content(), sort_keys=True).encode()).hexdigest()
    target = cache / f"{re.sub('[^A-Za-z0-9._-]', '_', source.stem)}-{digest[:12]}"
    while not (target / MANIFEST).is_file():
        try:
            with RunLock(target, "preparation"):
                try:
                    build_dataset(target, plan, settings, stop=stop)
                except InputFileError:
                    for path in target.iterdir():
                        _remove(path) if path.name != LOCK else None
                    raise
        except LockedError:
            time.sleep(0.2)
            if stop:
                raise stop.error(f"{target} is not prepared yet") from None
    for line in summary_lines(target):
        print(line, flush=True)
    return target


def summary_lines(folder: Path) -> list[str]:
    """One line for each kind of skipped, replaced or suspicious text that the manifest of a data set counts."""
    content = read_json(folder / MANIFEST, MAX_MANIFEST)
    return [f"{folder}: {sentence}" for sentence in sentences(content.get("counts", {}))]


def build_dataset(
    folder: Path, plan: BuildPlan, settings: Settings, workers: int = 0, stop: StopSignal | None = None
) -> None:
    """Writes the missing token files of a plan with `workers` processes (0: one for every four cores), then a manifest.

    The caller holds the folder's lock. A build that fails before its first token file is complete removes its plan,
    so that the same folder can be used again with corrected flags.
    """
    _write_or_check_plan(folder, plan)
    try:
        _build(folder, plan, settings, workers, stop)
    except SmolLMError as error:
        if not isinstance(error, StoppedError) and not _has_tokens(folder):
            for path in (folder / PLAN, *folder.glob(".*.tmp")):
                _remove(path)
        raise


def _build(folder: Path, plan: BuildPlan, settings: Settings, workers: int, stop: StopSignal | None) -> None:
    if (folder / MANIFEST).is_file():
        return
    for leftover in folder.glob(".*.tmp"):
        _remove(leftover)
    metadata = plan.metadata
    job = Job(
        str(folder), str(settings.tokenizer), metadata["tokenizer_sha256"], metadata["text_column"],
        metadata["shard_tokens"], metadata["cut"], settings.on_bad_text, settings.special_tokens,
    )  # fmt: skip
    before = _unit_states(folder)
    units = [
        dataclasses.replace(unit, files_written=state.files, chunks_written=state.chunks)
        if (state := before.get(unit.number))
        else unit
        for unit in plan.units
    ]
    pending = [unit for unit in units if unit.number not in before or not before[unit.number].done]
    pending.sort(key=lambda unit: -sum(unit.sizes))  # longest first, so that no single unit delays the end
    workers = min(workers or -(-len(os.sched_getaffinity(0)) // THREADS), len(pending))
    total_bytes, pending_bytes = (sum(sum(unit.sizes) for unit in group) for group in (units, pending))
    with _ProgressReport(folder, total_bytes, total_bytes - pending_bytes) as progress:
        stop = StopSignal() if stop is None else stop
        if workers > 1:
            counts = _tokenize_in_workers(pending, job, workers, progress, stop)
        else:
            counts = _tokenize_in_process(pending, job, plan.tokenizer, progress, stop)
    after = _unit_states(folder)
    names = [unit.file_name(i) for unit in plan.units if unit.number in after for i in range(after[unit.number].files)]
    counts += _saved_counts(folder, {unit.number for unit in plan.units} - {unit.number for unit in pending}, after)
    if not names:
        skipped = counts["documents_skipped"]
        column = metadata["text_column"]
        reason = (
            f": --on-bad-text skipped every document ({skipped:,}), none has a usable {column!r}" if skipped else ""
        )
        raise InputFileError(f"{plan.sources}: holds no text{reason}")
    recorded = {"counts": dict(sorted(counts.items()))} if counts else {}
    write_manifest(folder, names, metadata | recorded | {"sources": plan.files})


@dataclasses.dataclass
class _UnitState:
    """How much of a work unit is on disk."""

    files: int
    chunks: int  # text chunks in these files
    done: bool


def _unit_states(folder: Path) -> dict[int, _UnitState]:
    """The state of each work unit that has a token file, by its number."""
    states: dict[int, _UnitState] = {}
    for path in sorted(folder.glob("[0-9]*-[0-9]*"), key=lambda path: tuple(map(int, path.name.split("-")))):
        unit, number = map(int, path.name.split("-"))
        if number == (states[unit].files if unit in states else 0):
            sidecar = read_json(path / "tokens.json")
            states[unit] = _UnitState(number + 1, sidecar["passages"], sidecar["last"])
    return states


def _saved_counts(folder: Path, units: set[int], states: dict[int, _UnitState]) -> collections.Counter[str]:
    """The counts of units that an earlier start finished, as the last token file of each records them."""
    counts: collections.Counter[str] = collections.Counter()
    for number in units:
        last = folder / WorkUnit(number, [], []).file_name(states[number].files - 1)
        counts.update(read_json(last / "tokens.json").get("counts", {}))
    return counts


def _write_or_check_plan(folder: Path, plan: BuildPlan) -> None:
    """Writes the plan, or compares it with the one on disk; raises `UsageError` naming the first difference."""
    path, current = folder / PLAN, plan.content()
    saved = read_json(path, MAX_MANIFEST) if path.is_file() else None
    if saved is not None and (not isinstance(saved, dict) or type(saved.get("files")) is not dict):
        raise InputFileError(f"{path}: is not the plan of a data set")
    if saved is None or not _has_tokens(folder):  # no token file depends on the saved plan yet: replace it
        expected = (LOCK, PLAN) if saved else (LOCK,)
        others = [path.name for path in folder.iterdir() if path.name not in expected and path.suffix != ".tmp"]
        if others:
            raise UsageError(f"{folder}: holds {short_repr(others[0])} but no data set: choose another --out")
        path.unlink(missing_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(current) + "\n", encoding="utf-8")
        return
    for name in dict.fromkeys([*plan.metadata, *DEFAULTS]):
        saved_value, value = (content.get(name, DEFAULTS.get(name)) for content in (saved, current))
        if saved_value != value:
            change = f"{name} {short_repr(saved_value)}, not {short_repr(value)}"
            raise UsageError(f"{folder}: was started with {change}: choose another --out")
    files = saved["files"]
    for name in [*files, *current["files"]]:
        if name not in files or name not in current["files"]:
            with_or_without = "with" if name in files else "without"
            raise UsageError(
                f"{folder}: was started {with_or_without} {name}: give the same sources, or choose another --out"
            )
        if files[name] != current["files"][name]:
            raise UsageError(f"{name}: has changed since {folder} was started: choose another --out")
    if saved.get("cuts") != current["cuts"] and not (folder / MANIFEST).is_file():
        raise UsageError(
            f"{folder}: was started by a version that cuts long texts at other positions: choose another --out"
        )
    if saved | {"cuts": current["cuts"]} != current or list(files) != list(current["files"]):
        raise UsageError(
            f"{folder}: was started by another version of this script or with its sources in another order: "
            "give them in the same order, or choose another --out"
        )


def _has_tokens(folder: Path) -> bool:
    """Whether a folder has a complete token file."""
    return any(folder.glob("[0-9]*-[0-9]*")) or (folder / MANIFEST).is_file()


def _tokenize_in_process(
    units: list[WorkUnit], job: Job, tokenizer: Tokenizer, progress: "_ProgressReport", stop: StopSignal
) -> collections.Counter[str]:
    """Tokenizes all units in this process, with the tokenizer's own threads; returns their summed counts."""

    def on_progress(size: float, tokens: int) -> None:
        progress.add(size, tokens)
        if stop:
            raise stop.error(_resumable(job))

    counts: collections.Counter[str] = collections.Counter()
    for unit in units:
        counts.update(tokenize_unit(unit, job, tokenizer, on_progress))
    return counts


def _tokenize_in_workers(
    units: list[WorkUnit], job: Job, workers: int, progress: "_ProgressReport", stop: StopSignal
) -> collections.Counter[str]:
    """Tokenizes all units in worker processes; returns their summed counts.

    When a worker fails or a signal arrives, the workers are killed: a token file is complete or absent.
    """
    counts: collections.Counter[str] = collections.Counter()
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])),
        "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": str(threads > 1).lower(),
    }
    command = [sys.executable, "-m", "smollm_jax.data.prepare_worker", json.dumps(dataclasses.asdict(job))]
    tasks, replies = queue.SimpleQueue(), queue.SimpleQueue()
    for unit in units:
        tasks.put(unit)
    processes: list[subprocess.Popen[str]] = []
    # Ctrl-C in a terminal reaches the workers too, so the signals are blocked while they start: they inherit the mask.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        for _ in range(workers):
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, env=environment, **pipes))
            threading.Thread(target=_feed_worker, args=(processes[-1], tasks, replies), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        pending = len(units)
        while pending:
            if stop:
                raise stop.error(_resumable(job))
            try:
                reply = replies.get(timeout=0.2)
            except queue.Empty:
                continue
            if "error" in reply:
                error_name, message = reply["error"]
                raise getattr(errors, error_name)(message)
            pending -= "done" in reply
            counts.update(reply.get("counts", {}))
            progress.add(reply.get("bytes", 0), reply.get("tokens", 0))
        return counts
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _resumable(job: Job) -> str:
    return f"{job.folder}: finished files are kept; run the same command again to continue"


def _feed_worker(process: Any, tasks: queue.SimpleQueue, replies: queue.SimpleQueue) -> None:
    """Sends units to a worker until none is pending, and forwards its replies."""
    try:
        while True:
            print(json.dumps(dataclasses.asdict(tasks.get_nowait())), file=process.stdin, flush=True)
            for line in process.stdout:
                replies.put(reply := json.loads(line))
                if reply.keys() & {"done", "error"}:
                    break
            else:
                raise BrokenPipeError
    except queue.Empty:
        return
    except (OSError, ValueError):
        message = f"a preparation worker exited with status {process.wait()}; run the same command again to continue"
        replies.put({"error": [SmolLMError.__name__, message]})


class _ProgressReport:
    """Progress of a build: a bar on a terminal, otherwise a line every ten seconds."""

    def __init__(self, folder: Path, total_bytes: int, done_bytes: float):
        self._folder, self._total, self._done_before, self._done = folder, total_bytes, done_bytes, done_bytes
        self._tokens = 0
        console = Console(stderr=False, highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console) if console.is_terminal else None

    def __enter__(self) -> "_ProgressReport":
        self._started = self._last_report = time.monotonic()
        if self._bar:
            self._task = self._bar.add_task("preparing", total=self._total, completed=int(self._done))
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, size: float, tokens: int) -> None:
        """Adds `size` bytes of the sources and their tokens to what is done."""
        self._done, self._tokens, now = self._done + size, self._tokens + tokens, time.monotonic()
        if self._bar is None and now - self._last_report < REPORT_SECONDS:
            return
        self._last_report, seconds = now, max(now - self._started, 1e-9)
        bytes_per_second = (self._done - self._done_before) / seconds
        text = f"{bytes_per_second / 1e6:.1f} MB/s, {self._tokens / seconds:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=self._done, description=text)
        else:
            remaining = int((self._total - self._done) / max(bytes_per_second, 1e-9))
            done = f"{self._done / max(self._total, 1):.0%} of {self._total / 1e6:,.0f} MB"
            print(f"{self._folder}: {done}, {text}, ETA {remaining // 60}:{remaining % 60:02}", flush=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
