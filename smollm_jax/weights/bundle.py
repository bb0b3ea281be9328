"""The common form of weights in any format: a `Bundle` of tensors, config and tokenizer files.

Every reader returns a bundle and every writer takes one: NumPy arrays with Hugging Face's names and layout, checked by
`mapping.py`. Framework-free.
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
    """Weights independent of a file format. `origin` describes in words where they come from.

    `generation_config` is the content of `generation_config.json`, or None if the weights have no such file.
    """

    tensors: dict[str, np.ndarray]
    config: Config
    tokenizer_files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    origin: str = ""
    generation_config: dict[str, Any] | None = None

    @property
    def dtype(self) -> str:
        """NumPy's name for the most common dtype, counted by elements."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.size
        return max(sizes, key=lambda name: sizes[name])


def config_in_same_folder(path: Path) -> Config:
    if not (path.parent / "config.json").is_file():
        raise InputFileError(f"{path}: holds no config: put the model's config.json into the same folder")
    return read_config(path.parent / "config.json")
