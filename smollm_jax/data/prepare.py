"""A plan becomes a data set: who works on it, and how a second start finds what the first one finished.

Every token file depends on the plan alone: not on how many processes worked, nor on how often they were killed.
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
from smollm_jax.data.plan import DEFAULTS, Plan, Settings, make_plan
from smollm_jax.data.prepare_worker import Job, Unit, prepare_unit
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
THREADS = 4  # of the tokenizer in a process: they share its vocabulary, which two processes hold twice in the cache
REPORT_SECONDS = 10  # between two lines where the output is no terminal


def prepared(source: Path, settings: Settings, cache: Path, stop: StopSignal | None, tokenizer: Tokenizer) -> Path:
    """The folder under `cache` of a source's tokens, made if it is not there, named by the content it was made from.

    Several processes may ask for it at once: one makes it. Says what was left out of the source.
    """
    plan = make_plan([source], settings, by_content=True, tokenizer=tokenizer)
    print(*plan.notes, sep="\n", end="\n" * bool(plan.notes), flush=True)
    digest = hashlib.sha256(json.dumps(plan.content(), sort_keys=True).encode()).hexdigest()
    target = cache / f"{re.sub('[^A-Za-z0-9._-]', '_', source.stem)}-{digest[:12]}"
    while not (target / MANIFEST).is_file():
        try:
            with RunLock(target, "preparation"):
                try:
                    prepare_set(target, plan, settings, stop=stop)
                except InputFileError:
                    for path in target.iterdir():
                        _remove(path) if path.name != LOCK else None
                    raise
        except LockedError:
            time.sleep(0.2)
            if stop:
                raise stop.error(f"{target} is not prepared yet") from None
    for line in report_of(target):
        print(line, flush=True)
    return target


def report_of(folder: Path) -> list[str]:
    """What a user is to know of how a data set was made, a line each: what was left out, replaced, or is suspicious."""
    content = read_json(folder / MANIFEST, MAX_MANIFEST)
    return [f"{folder}: {sentence}" for sentence in sentences(content.get("counts", {}))]


def prepare_set(folder: Path, plan: Plan, settings: Settings, workers: int = 0, stop: StopSignal | None = None) -> None:
    """Makes what is missing of a plan's token files, by so many processes (0: one for four cores), then the manifest.

    The folder is locked by the caller. A preparation that is refused before a token file is finished leaves nothing in
    it, so that the same folder can be named again with the flag that was missing.
    """
    _begin(folder, plan)
    try:
        _go_on(folder, plan, settings, workers, stop)
    except SmolLMError as error:
        if not isinstance(error, StoppedError) and not _has_tokens(folder):
            for path in (folder / PLAN, *folder.glob(".*.tmp")):
                _remove(path)
        raise


def _go_on(folder: Path, plan: Plan, settings: Settings, workers: int, stop: StopSignal | None) -> None:
    if (folder / MANIFEST).is_file():
        return
    for rest in folder.glob(".*.tmp"):
        _remove(rest)
    about = plan.about
    job = Job(
        str(folder), str(settings.tokenizer), about["tokenizer_sha256"], about["text_column"], about["shard_tokens"],
        about["cut"], settings.on_bad_text, settings.special_tokens,
    )  # fmt: skip
    found = _written(folder)
    units = [dataclasses.replace(unit, **found.get(unit.number, ({}, False))[0]) for unit in plan.units]
    left = [unit for unit in units if not found.get(unit.number, ({}, False))[1]]
    left.sort(key=lambda unit: -sum(unit.sizes))  # the longest first, so that none is waited for at the end
    workers = min(workers or -(-len(os.sched_getaffinity(0)) // THREADS), len(left))
    size, todo = (sum(sum(unit.sizes) for unit in of) for of in (units, left))
    with _Progress(folder, size, size - todo) as progress:
        stop = StopSignal() if stop is None else stop
        if workers > 1:
            counts = _work(left, job, workers, progress, stop)
        else:
            counts = _work_here(left, job, plan.tokenizer, progress, stop)
    found = _written(folder)
    names = [
        unit.file_name(i) for unit in plan.units for i in range(found.get(unit.number, ({"files": 0},))[0]["files"])
    ]
    counts += _counts_before(folder, {unit.number for unit in plan.units} - {unit.number for unit in left}, found)
    if not names:
        none = f", none has a usable {about['text_column']!r}"
        why = (
            f": all its documents were left out, {skipped:,}{none}" if (skipped := counts["documents_skipped"]) else ""
        )
        raise InputFileError(f"{plan.sources}: holds no text{why}")
    kept = {"counts": dict(sorted(counts.items()))} if counts else {}
    write_manifest(folder, names, about | kept | {"sources": plan.files})


def _counts_before(
    folder: Path, units: set[int], written: dict[int, tuple[dict[str, int], bool]]
) -> collections.Counter[str]:
    """What earlier starts counted of units they ended: the last token file of each has it. One without files is new."""
    counts: collections.Counter[str] = collections.Counter()
    for number in units:
        last = folder / Unit(number, [], []).file_name(written[number][0]["files"] - 1)
        counts.update(read_json(last / "tokens.json").get("counts", {}))
    return counts


def _begin(folder: Path, plan: Plan) -> None:
    """Writes the plan, or finds that it is the one written before; raises `UsageError` naming what differs."""
    path, now = folder / PLAN, plan.content()
    then = read_json(path, MAX_MANIFEST) if path.is_file() else None
    if then is not None and (not isinstance(then, dict) or type(then.get("files")) is not dict):
        raise InputFileError(f"{path}: is not the plan of a data set")
    if then is None or not _has_tokens(folder):  # with a plan of which nothing is done, nothing is lost
        ours = (LOCK, PLAN) if then else (LOCK,)
        if others := [path.name for path in folder.iterdir() if path.name not in ours and path.suffix != ".tmp"]:
            raise UsageError(f"{folder}: holds {short_repr(others[0])} and no data set: name another --out")
        path.unlink(missing_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(now) + "\n", encoding="utf-8")
        return
    for name in dict.fromkeys([*plan.about, *DEFAULTS]):
        before, wanted = (content.get(name, DEFAULTS.get(name)) for content in (then, now))
        if before != wanted:
            change = f"{name} {short_repr(before)}, not {short_repr(wanted)}"
            raise UsageError(f"{folder}: was begun with {change}: name another --out")
    files = then["files"]
    for name in [*files, *now["files"]]:
        if name not in files or name not in now["files"]:
            said = "with" if name in files else "without"
            raise UsageError(f"{folder}: was begun {said} {name}: name the same sources, or another --out")
        if files[name] != now["files"][name]:
            raise UsageError(f"{name}: has changed since {folder} was begun: name another --out")
    if then.get("cuts") != now["cuts"] and not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder}: was begun by a version that cut long texts elsewhere: name another --out")
    if then | {"cuts": now["cuts"]} != now or list(files) != list(now["files"]):
        raise UsageError(f"{folder}: was begun by another version of this script, or with its sources in another order")


def _has_tokens(folder: Path) -> bool:
    """Whether a folder holds a token file that is finished."""
    return any(folder.glob("[0-9]*-[0-9]*")) or (folder / MANIFEST).is_file()


def _written(folder: Path) -> dict[int, tuple[dict[str, int], bool]]:
    """Of each unit how many files and passages are written, and whether that is all."""
    found: dict[int, tuple[dict[str, int], bool]] = {}
    for path in sorted(folder.glob("[0-9]*-[0-9]*"), key=lambda path: tuple(map(int, path.name.split("-")))):
        unit, number = map(int, path.name.split("-"))
        if number == found.get(unit, ({"files": 0},))[0]["files"]:
            about = read_json(path / "tokens.json")
            found[unit] = ({"files": number + 1, "passages": about["passages"]}, about["last"])
    return found


def _work_here(
    units: list[Unit], job: Job, tokenizer: Tokenizer, progress: "_Progress", stop: StopSignal
) -> collections.Counter[str]:
    """All units, by this process and as many threads as the tokenizer takes; returns what they counted."""

    def tell(size: float, tokens: int) -> None:
        progress.add(size, tokens)
        if stop:
            raise stop.error(f"{job.folder}: what was finished is kept; the same command goes on")

    counts: collections.Counter[str] = collections.Counter()
    for unit in units:
        counts.update(prepare_unit(unit, job, tokenizer, tell))
    return counts


def _work(
    units: list[Unit], job: Job, workers: int, progress: "_Progress", stop: StopSignal
) -> collections.Counter[str]:
    """All units, by processes that are killed when one fails or a signal comes: what they finished is whole.

    Returns what the units counted.
    """
    counts: collections.Counter[str] = collections.Counter()
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])),
        "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": str(threads > 1).lower(),
    }
    command = [sys.executable, "-m", "smollm_jax.data.prepare_worker", json.dumps(dataclasses.asdict(job))]
    todo, told = queue.SimpleQueue(), queue.SimpleQueue()
    for unit in units:
        todo.put(unit)
    processes: list[subprocess.Popen[str]] = []
    # A terminal sends its Ctrl-C to them too, who inherit what is blocked here.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        for _ in range(workers):
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, env=environment, **pipes))
            threading.Thread(target=_serve, args=(processes[-1], todo, told), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        left = len(units)
        while left:
            if stop:
                raise stop.error(f"{job.folder}: what was finished is kept; the same command goes on")
            try:
                answer = told.get(timeout=0.2)
            except queue.Empty:
                continue
            if "error" in answer:
                kind, message = answer["error"]
                raise getattr(errors, kind)(message)
            left -= "done" in answer
            counts.update(answer.get("counts", {}))
            progress.add(answer.get("bytes", 0), answer.get("tokens", 0))
        return counts
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _serve(process: Any, todo: queue.SimpleQueue, told: queue.SimpleQueue) -> None:
    """Gives a worker units until there are none, and passes on what it says."""
    try:
        while True:
            print(json.dumps(dataclasses.asdict(todo.get_nowait())), file=process.stdin, flush=True)
            for line in process.stdout:
                told.put(answer := json.loads(line))
                if answer.keys() & {"done", "error"}:
                    break
            else:
                raise BrokenPipeError
    except queue.Empty:
        return
    except (OSError, ValueError):
        said = f"a process that prepares data ended with status {process.wait()}; the same command goes on"
        told.put({"error": [SmolLMError.__name__, said]})


class _Progress:
    """How far a preparation is: a bar on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, folder: Path, size: int, done: float):
        self._folder, self._size, self._first, self._done, self._tokens = folder, size, done, done, 0
        console = Console(stderr=False, highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console) if console.is_terminal else None

    def __enter__(self) -> "_Progress":
        self._began = self._said = time.monotonic()
        if self._bar:
            self._task = self._bar.add_task("preparing", total=self._size, completed=int(self._done))
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, size: float, tokens: int) -> None:
        """So many bytes of the sources and tokens more are done."""
        self._done, self._tokens, now = self._done + size, self._tokens + tokens, time.monotonic()
        if self._bar is None and now - self._said < REPORT_SECONDS:
            return
        self._said, seconds = now, max(now - self._began, 1e-9)
        rate = (self._done - self._first) / seconds
        text = f"{rate / 1e6:.1f} MB/s, {self._tokens / seconds:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=self._done, description=text)
        else:
            left = int((self._size - self._done) / max(rate, 1e-9))
            far = f"{self._done / max(self._size, 1):.0%} of {self._size / 1e6:,.0f} MB"
            print(f"{self._folder}: {far}, {text}, ETA {left // 60}:{left % 60:02}", flush=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
