"""Weights between formats: a `Bundle` of tensors, config and tokenizer files.

Every reader gives, and every writer takes, one: Hugging Face's tensor names and layout as NumPy arrays. What the
tensors must be is checked in `mapping.py`. Framework-free.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax.config import Config
from smollm_jax.config.hf_config import read_config
from smollm_jax.errors import InputFileError


@dataclasses.dataclass
class Bundle:
    """Weights on their way between formats. `origin` says in words where the numbers come from.

    `generation_config` is the content of `generation_config.json`, None where the weights have none.
    """

    tensors: dict[str, np.ndarray]
    config: Config
    tokenizer_files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    origin: str = ""
    generation_config: dict[str, Any] | None = None

    @property
    def dtype(self) -> str:
        """The dtype most of the numbers have, by numpy's name."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.size
        return max(sizes, key=lambda name: sizes[name])


def config_beside(path: Path) -> Config:
    if not (path.parent / "config.json").is_file():
        raise InputFileError(f"{path}: carries no config, and no config.json lies beside it")
    return read_config(path.parent / "config.json")
