"""The work that every backend of a benchmark gets, and its seeded inputs. Imports no framework."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.compare import PROMPT
from smollm_jax.config import Config, Recipe, preset
from smollm_jax.config.recipe import Remat

GEMM = 2048  # rows and columns of the matmul timed in each round: float32 on a CPU, bfloat16 on a GPU
SAMPLES = 256  # values of each result that two backends compare
Unit = Callable[[], dict[str, Any]]  # runs one unit of work; its results replace those that the process measured
# A unit of work, a function that runs matmuls of size `GEMM` and returns how many, and the `ready` report.
Prepared = tuple[Unit, Callable[[], int], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Workload:
    """The flags of `scripts/benchmark.py` that a backend gets."""

    what: str
    preset: str
    rounds: int
    batch_size: int
    sequence_length: int
    new_tokens: int
    document_tokens: int
    dtype: Literal["float32", "bfloat16"]
    remat: Remat | None  # None: as the trainer chooses
    unroll: int | None = None
    copies: int = 1
    quantize: Literal["bf16", "int8"] | None = None
    method: Literal["sft", "lora", "dpo"] = "sft"

    @property
    def config(self) -> Config:
        return preset(self.preset)

    @property
    def training(self) -> bool:
        """Whether it takes optimizer steps. Only then are the weights float32 whatever `dtype` is."""
        return self.what in ("train", "memory", "startup", "finetune")

    def recipe(self) -> Recipe:
        """The training settings, the same for every backend."""
        length = PROMPT if self.what == "decode" else self.sequence_length
        return Recipe(100_000, self.batch_size, length, learning_rate=1e-3, warmup_steps=0, dtype=self.dtype)

    def tokens(self) -> np.ndarray:
        """Seeded windows of T + 1 tokens."""
        shape = (self.batch_size, self.recipe().sequence_length + 1)
        return np.random.default_rng(0).integers(0, self.config.vocab_size, shape, np.int32)

    def heads(self) -> list[np.ndarray]:
        """q, k, v and the gradient of attention's output, `[B, T, heads, H]`, seeded, float32."""
        N, K, rng = self.config.num_attention_heads, self.config.num_key_value_heads, np.random.default_rng(0)
        shapes = [(self.batch_size, self.sequence_length, heads, self.config.head_dim) for heads in (N, K, K, N)]
        return [rng.standard_normal(shape, np.float32) for shape in shapes]

    def segments(self) -> np.ndarray:
        """The document index `[B, T]` of every token; documents have 0.5 to 1.5 times `document_tokens` tokens."""
        shortest, longest = max(1, self.document_tokens // 2), max(2, self.document_tokens * 3 // 2)
        rng, out = np.random.default_rng(0), np.zeros((self.batch_size, self.sequence_length), np.int32)
        for row in out:
            start = 0
            while start < row.size:
                start += int(rng.integers(shortest, longest))
                row[start:] += 1
        return out

    def head(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hidden states `[M, D]`, a head `[V, D]` and targets `[M]`, seeded, float32, scaled as at initialisation."""
        M, D, V = self.batch_size * self.sequence_length, self.config.hidden_size, self.config.vocab_size
        rng = np.random.default_rng(0)
        weight = rng.standard_normal((V, D), np.float32) * np.float32(self.config.initializer_range)
        return rng.standard_normal((M, D), np.float32), weight, rng.integers(0, V, M, np.int32)

    def matmuls(self) -> dict[str, tuple[int, int, int]]:
        """Rows, inner size and columns of each matmul in the forward pass of `batch_size * sequence_length` tokens."""
        c, M = self.config, self.batch_size * self.sequence_length
        query, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        D, F = c.hidden_size, c.intermediate_size
        shapes = {"qkv": (D, query + 2 * kv), "o": (query, D), "gate+up": (D, 2 * F), "down": (F, D)}
        return {name: (M, *shape) for name, shape in (shapes | {"head": (D, c.vocab_size)}).items()}

    def flops(self) -> dict[str, float]:
        """FLOPs of those matmuls, two per multiply-add, and of one layer's attention, halved for the causal mask."""
        matmuls = {name: 2.0 * rows * inner * columns for name, (rows, inner, columns) in self.matmuls().items()}
        heads = self.batch_size * self.config.num_attention_heads * self.config.head_dim
        attention = 2.0 * heads * self.sequence_length * (self.sequence_length + 1)
        return matmuls | {"attention": attention, "attention both ways": 3 * attention}


def samples(array: Any) -> list[float]:
    """`SAMPLES` values at fixed positions of a result, to compare between backends."""
    flat = np.asarray(array, np.float32).reshape(-1)
    return flat[np.random.default_rng(1).integers(0, flat.size, SAMPLES)].tolist()


def decoded(pieces: list[Any], times: list[float]) -> dict[str, Any]:
    """Seconds and number of decoded tokens `[B, 1]`, and all ids. The first is not timed: it includes the prefill."""
    tokens = sum(piece.size for piece in pieces[1:])
    return {"seconds": times[-1] - times[0], "tokens": tokens, "ids": np.concatenate(pieces, axis=1).tolist()}


def resident(what: Literal["VmHWM", "VmRSS"]) -> int:
    """Bytes of this process in memory: peak (VmHWM) or now (VmRSS). `ru_maxrss` would start at the parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def per_call(repeat: Callable[[int], None], least_seconds: float = 0.2) -> Unit:
    """A unit of work that repeats a call, for about `least_seconds`, and returns the seconds of one call."""
    repeat(1)  # compiles
    began = time.perf_counter()
    repeat(1)
    times = max(1, int(least_seconds / (time.perf_counter() - began)))

    def unit() -> dict[str, Any]:
        began = time.perf_counter()
        repeat(times)
        return {"seconds": (time.perf_counter() - began) / times}

    return unit


def rates(workload: Workload, work: dict[str, Callable[[int], None]]) -> Unit:
    """A unit of work that runs each kernel: their FLOP/s, and the seconds of a step that consists of them alone."""
    flops = workload.flops()
    units = {name: per_call(repeat, 0.1) for name, repeat in work.items()}
    assert units.keys() == flops.keys()

    def unit() -> dict[str, Any]:
        seconds = {name: unit()["seconds"] for name, unit in units.items()}
        layer = sum(seconds[name] for name in ("qkv", "o", "gate+up", "down"))
        layers = workload.config.num_hidden_layers
        step = 3 * (layers * layer + seconds["head"])  # a matmul's two gradients are matmuls of the same size
        step += layers * seconds["attention both ways"]
        return {"rates": {name: flops[name] / seconds[name] for name in seconds}, "seconds": step}

    return unit
