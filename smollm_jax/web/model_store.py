"""The weights that can be picked, and the few of them that are loaded.

A client picks by a name of the list and can name no path: what is not under `assets/` or `runs/`, or given with
--weights, cannot be loaded.
"""

import collections
import dataclasses
import subprocess
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path

from smollm_jax import weights
from smollm_jax.config.generation_config import UNKNOWN, GenerationConfig
from smollm_jax.errors import InputFileError, StorageError
from smollm_jax.generation.engine import Engine
from smollm_jax.generation.quantized import Quantize
from smollm_jax.runs.checkpoint import steps_in
from smollm_jax.web.requests import choice

REAL = "SmolLM2-135M-Instruct"
FETCH_SECONDS = 1800


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An engine, and what the page says of it."""

    engine: Engine
    longest_token: int  # bytes


class Shelf:
    """Names and their paths, as the folders are now; the newest `keep` of the used ones stay in memory."""

    def __init__(
        self,
        *,
        given: Path | None,
        assets: Path,
        runs: Path,
        fetch: Sequence[str],  # the command that brings assets/SmolLM2-135M-Instruct
        dtype: str = "float32",
        quantize: Quantize | None = None,
        tokenizer: Path | None = None,
        keep: int = 2,
    ):
        self.given, self.assets, self.runs_folder, self.dtype = given, assets, runs, dtype
        self._fetch, self._tokenizer, self._keep = fetch, tokenizer, keep
        self._quantize: Quantize | None = quantize
        self._loaded: collections.OrderedDict[tuple[Path, int], Loaded] = collections.OrderedDict()
        self._lock = threading.Lock()

    def runs(self) -> dict[str, Path]:
        """The run folders that have a log or a checkpoint, newest first."""
        folders = [path for path in _folders(self.runs_folder) if (path / "metrics.jsonl").is_file() or _steps(path)]
        return {path.name: path for path in sorted(folders, key=_written, reverse=True)}

    def steps(self, run: str) -> list[int]:
        """The steps of a run's checkpoints, oldest first."""
        runs = self.runs()
        return _steps(runs[choice("run", run, runs)])

    def entries(self) -> dict[str, Path]:
        """Every name that can be picked; the first is what the page starts with."""
        listed = {} if self.given is None else {str(self.given): self.given}
        real = self.assets / REAL
        assets = [path for path in sorted(self.assets.glob("*")) if _is_weights(path)]
        listed |= {f"{self.assets.name}/{path.name}": path for path in [real, *assets]}
        for name, run in self.runs().items():
            steps = _steps(run)
            if steps:
                listed[f"{self.runs_folder.name}/{name}"] = run
            for step in reversed(steps):
                listed[f"{self.runs_folder.name}/{name}/checkpoints/{step}"] = run / "checkpoints" / str(step)
        return listed

    def checkpoint(self, run: str, step: int) -> str:
        """The name of one checkpoint of a run."""
        return f"{self.runs_folder.name}/{run}/checkpoints/{step}"

    def loaded(self, name: str) -> Loaded | None:
        """What is in memory of a listed name."""
        path = self.entries().get(name)
        return None if path is None or not path.exists() else self._loaded.get(_identity(path))

    def generation(self, name: object) -> GenerationConfig:
        """How the weights of a listed name ask to be written with; greedy where nothing is known of them yet."""
        listed = self.entries()
        path = listed[choice("weights", name, listed)]
        if not path.exists():  # not fetched yet
            return UNKNOWN
        loaded = self.loaded(str(name))
        return loaded.engine.generation if loaded else weights.generation_of(path)

    def open(self, name: object) -> Generator[str, None, Loaded]:
        """Gives the loaded weights of a listed name, fetched and loaded if they must be; yields what it is doing."""
        listed = self.entries()
        path = listed[choice("weights", name, listed)]
        if path == self.assets / REAL and not path.exists():
            yield from self._fetched(path)
        key = _identity(path)
        if key not in self._loaded:
            yield "loading"
        with self._lock:
            if key not in self._loaded:
                while len(self._loaded) >= self._keep:  # before, so that no more than these are ever in memory
                    self._loaded.popitem(last=False)
                self._loaded[key] = _load(key[0], self.dtype, self._tokenizer, self._quantize)
            self._loaded.move_to_end(key)
            return self._loaded[key]

    def _fetched(self, path: Path) -> Generator[str, None, None]:
        process = subprocess.Popen(
            self._fetch, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
        )
        try:
            began = time.monotonic()
            while process.poll() is None:
                if time.monotonic() - began > FETCH_SECONDS:
                    raise StorageError(f"{path}: was not fetched within {FETCH_SECONDS} seconds")
                yield "fetching the weights, about 90 MB, this once"
                time.sleep(0.2)
            if process.returncode:
                said = (process.stderr.read() if process.stderr else "").strip().splitlines()
                raise StorageError(f"{path}: could not be fetched: {said[-1] if said else 'no reason given'}")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def _load(path: Path, dtype: str, tokenizer: Path | None, quantize: Quantize | None) -> Loaded:
    engine = Engine.load(path, dtype=dtype, tokenizer=tokenizer, quantize=quantize)
    # A byte-level entry has one symbol a byte; an added token stands for itself.
    return Loaded(engine, max((len(token.encode()) for token in engine.tokenizer.core.get_vocab()), default=1))


def _identity(path: Path) -> tuple[Path, int]:
    """The path itself, of a run its newest checkpoint, and when it was written: a new file is loaded anew."""
    steps = _steps(path)
    path = path / "checkpoints" / str(steps[-1]) if steps else path
    try:
        return path, path.stat().st_mtime_ns
    except OSError as error:
        raise InputFileError(f"{path}: is no longer there") from error


def _steps(run: Path) -> list[int]:
    return steps_in(run / "checkpoints")


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.glob("*") if path.is_dir()]


def _written(run: Path) -> float:
    log = run / "metrics.jsonl"
    try:
        return (log if log.is_file() else run).stat().st_mtime
    except OSError:  # removed meanwhile
        return 0.0


def _is_weights(path: Path) -> bool:
    try:
        return bool(weights.kind_of(path))
    except InputFileError:
        return False
