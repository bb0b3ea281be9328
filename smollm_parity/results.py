"""The arrays in a backend's folder: backends write them, `rungs.py` reads them. NumPy only."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smollm_parity import metrics


def write(out: Path, name: str, array: Any) -> None:
    np.save(out / f"{name}.npy", np.asarray(array))


def write_stream(out: Path, dtype: str, stream: np.ndarray, logits: np.ndarray) -> None:
    """Writes a residual stream, as float64 if `dtype` is float64 and else as float32, and the logits."""
    write(out, f"stream-{dtype}", stream.astype(np.float64 if dtype == "float64" else np.float32))
    write(out, f"logits-{dtype}", logits)


def write_gradient(out: Path, dtype: str, loss: float, gradient: dict[str, Any]) -> None:
    write(out, f"loss-{dtype}", loss)
    np.savez(out / f"gradient-{dtype}.npz", **gradient)


@dataclasses.dataclass(frozen=True)
class Results:
    """The arrays in each backend's folder, and the tokens `[B, T]` that they were computed from."""

    folders: dict[str, Path]
    texts: np.ndarray

    @property
    def backends(self) -> list[str]:
        return list(self.folders)

    @property
    def baseline(self) -> str:
        """The backend whose errors ours are compared with: transformers if installed, else the twin."""
        return self.backends[-1]

    def has(self, backend: str, name: str) -> bool:
        return (self.folders[backend] / f"{name}.npy").exists()

    def load(self, backend: str, name: str) -> np.ndarray:
        return np.load(self.folders[backend] / f"{name}.npy")

    def gradient(self, backend: str, dtype: str) -> Mapping[str, np.ndarray]:
        """The gradient by tensor name; each tensor is read from the file on access."""
        return np.load(self.folders[backend] / f"gradient-{dtype}.npz")

    def distribution(self, backend: str, name: str) -> dict[str, float]:
        """`metrics.distribution` of a backend's logits against the truth."""
        return metrics.distribution(self.load(backend, name), self.true_logits, self.texts)

    @functools.cached_property
    def true_logits(self) -> np.ndarray:
        """JAX's float64 logits `[B, T, V]`: the truth, which rung 1 compares with the twin's."""
        return self.load("jax", "logits-float64")

    @functools.cached_property
    def largest_logit(self) -> float:
        return np.abs(self.true_logits).max()

    @functools.cached_property
    def true_distribution(self) -> dict[str, float]:
        return metrics.distribution(self.true_logits, self.true_logits, self.texts)

    @functools.cached_property
    def bfloat16_distributions(self) -> dict[str, dict[str, float]]:
        """By backend."""
        return {backend: self.distribution(backend, "logits-bfloat16") for backend in self.backends}
