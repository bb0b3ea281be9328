"""The weights that the page offers, and the few of them that are in memory.

A client chooses by a name of the list, never by a path: only weights under `assets/` and `runs/`, or those of
--weights, can be loaded, the latter with and without the adapter of --adapter.
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
from smollm_jax.runtime.files import utf8
from smollm_jax.web.requests import choice
from smollm_jax.weights.adapted import find_adapter
from smollm_jax.weights.adapter import TENSORS

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DOWNLOAD_SECONDS = 1800


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """An engine, and the length of its tokenizer's longest token."""

    engine: Engine
    longest_token: int  # bytes


class ModelStore:
    """Names of weights and their paths, read from the folders at each call; an LRU cache of `max_loaded` models."""

    def __init__(
        self,
        *,
        initial_weights: Path | None,
        assets: Path,
        runs: Path,
        fetch: Sequence[str],  # the command that downloads assets/SmolLM2-135M-Instruct
        dtype: str = "float32",
        quantize: Quantize | None = None,
        tokenizer: Path | None = None,
        adapter: Path | None = None,
        max_loaded: int = 2,
    ):
        """`adapter`: of the weights that the page starts with, `initial_weights` or the downloaded ones."""
        self.initial_weights, self.assets, self.runs_folder, self.dtype = initial_weights, assets, runs, dtype
        self._fetch, self._tokenizer, self._max_loaded = fetch, tokenizer, max_loaded
        self._quantize: Quantize | None = quantize
        self._adapter = None if adapter is None else find_adapter(adapter)
        self._loaded: collections.OrderedDict[_Key, LoadedModel] = collections.OrderedDict()
        self._lock = threading.Lock()

    def runs(self) -> dict[str, Path]:
        """The run folders that have a log or a checkpoint, newest first."""
        folders = filter(_is_run, _folders(self.runs_folder))
        return {utf8(path.name): path for path in sorted(folders, key=_last_modified, reverse=True)}

    def steps(self, run: str) -> list[int]:
        """The steps of a run's checkpoints, oldest first."""
        runs = self.runs()
        return _steps(runs[choice("run", run, runs)])

    def entries(self) -> dict[str, Path]:
        """Every name that can be chosen, with its path; the page starts with the first."""
        entries = {} if self.initial_weights is None else {str(self.initial_weights): self.initial_weights}
        if self._adapter is not None:
            entries = {self._adapted_name: self.initial_weights or self.assets / DEFAULT_MODEL} | entries
        assets = [path for path in sorted(self.assets.glob("*")) if _is_weights(path)]
        entries |= {f"{self.assets.name}/{utf8(path.name)}": path for path in [self.assets / DEFAULT_MODEL, *assets]}
        for name, run in self.runs().items():
            steps = _steps(run)
            if steps:
                entries[f"{self.runs_folder.name}/{name}"] = run
            for step in reversed(steps):
                entries[f"{self.runs_folder.name}/{name}/checkpoints/{step}"] = run / "checkpoints" / str(step)
        return entries

    def checkpoint(self, run: str, step: int) -> str:
        """The name of one checkpoint of a run."""
        return f"{self.runs_folder.name}/{run}/checkpoints/{step}"

    def loaded(self, name: str) -> LoadedModel | None:
        """The model of a name if it is in memory."""
        path = self.entries().get(name)
        return None if path is None or not path.exists() else self._loaded.get(self._key(name, path))

    def generation(self, name: object) -> GenerationConfig:
        """The generation settings that the weights recommend; greedy for weights that are not downloaded yet."""
        entries = self.entries()
        path = entries[choice("weights", name, entries)]
        if not path.exists():
            return UNKNOWN
        loaded = self.loaded(str(name))
        return loaded.engine.generation if loaded else weights.generation_of(path)

    def open(self, name: object) -> Generator[str, None, LoadedModel]:
        """Returns the model of a name, downloaded and loaded where necessary; yields what it is doing."""
        entries = self.entries()
        path = entries[choice("weights", name, entries)]
        if path == self.assets / DEFAULT_MODEL and not path.exists():
            yield from self._download(path)
        key = self._key(str(name), path)
        if key not in self._loaded:
            yield "loading"
        with self._lock:
            if key not in self._loaded:
                while len(self._loaded) >= self._max_loaded:  # before loading, so that memory never holds more
                    self._loaded.popitem(last=False)
                self._loaded[key] = self._load(key)
            self._loaded.move_to_end(key)
            return self._loaded[key]

    @property
    def _adapted_name(self) -> str:
        return f"{self.initial_weights or f'{self.assets.name}/{DEFAULT_MODEL}'} with adapter {self._adapter}"

    def _key(self, name: str, path: Path) -> "_Key":
        """What identifies the model of a name: a new file is another model."""
        steps = _steps(path)
        files = [path / "checkpoints" / str(steps[-1]) if steps else path]  # of a run, its newest checkpoint
        if self._adapter is not None and name == self._adapted_name:
            files.append(self._adapter / TENSORS)
        return tuple((file, _modified(file)) for file in files)

    def _load(self, key: "_Key") -> LoadedModel:
        (path, _), *adapted = key
        adapter = self._adapter if adapted else None
        engine = Engine.load(
            path, dtype=self.dtype, tokenizer=self._tokenizer, quantize=self._quantize, adapter=adapter
        )
        # A byte-level entry has one symbol per byte; an added token is its own text.
        longest = max((len(token.encode()) for token in engine.tokenizer.core.get_vocab()), default=1)
        return LoadedModel(engine, longest)

    def _download(self, path: Path) -> Generator[str, None, None]:
        process = subprocess.Popen(
            self._fetch, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
        )
        try:
            began = time.monotonic()
            while process.poll() is None:
                if time.monotonic() - began > DOWNLOAD_SECONDS:
                    raise StorageError(f"{path}: the download did not finish within {DOWNLOAD_SECONDS} seconds")
                yield "downloading the weights, about 90 MB, once"
                time.sleep(0.2)
            if process.returncode:
                lines = (process.stderr.read() if process.stderr else "").strip().splitlines()
                raise StorageError(f"{path}: the download failed: {lines[-1] if lines else 'no reason given'}")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


_Key = tuple[tuple[Path, int], ...]  # of weights, and of an adapter's tensors if they have one: when they were modified


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise InputFileError(f"{path}: no longer exists") from error


def _steps(run: Path) -> list[int]:
    return steps_in(run / "checkpoints")


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.glob("*") if path.is_dir()]


def _is_run(path: Path) -> bool:
    try:
        return (path / "metrics.jsonl").is_file() or bool(_steps(path))
    except OSError:  # a folder that may not be read
        return False


def _last_modified(run: Path) -> float:
    log = run / "metrics.jsonl"
    try:
        return (log if log.is_file() else run).stat().st_mtime
    except OSError:  # deleted meanwhile
        return 0.0


def _is_weights(path: Path) -> bool:
    try:
        return bool(weights.kind_of(path))
    except InputFileError:
        return False
