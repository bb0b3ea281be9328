"""Weights of any format: `read` and `write` convert, `kind_of` says what a path holds.

One file a format: `huggingface`, `safetensors_file`, `torch_file`, `gguf_reader` and `gguf_writer`, `orbax_checkpoint`.
Framework-free until a format needs one.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from smollm_jax.config.generation_config import UNKNOWN, GenerationConfig, generation_of_folder
from smollm_jax.config.hf_config import read_config
from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.tokenizer.source import run_folder
from smollm_jax.weights import gguf_reader, gguf_writer, huggingface, safetensors_file, torch_file
from smollm_jax.weights.bundle import Bundle
from smollm_jax.weights.gguf_writer import GgufType
from smollm_jax.weights.hub import locate
from smollm_jax.weights.mapping import check
from smollm_jax.weights.orbax_checkpoint import read_orbax, write_orbax

if TYPE_CHECKING:
    pass

Kind = Literal["orbax", "hf", "pt", "safetensors", "gguf"]

PICKLES = (".bin", ".npy", ".npz", ".pkl", ".pickle", ".pth", ".ckpt")
INSTEAD = "give model.safetensors, or a .pt that torch.save wrote from the state dict (read as tensors only)"


def kind_of(path: Path) -> Kind:
    """What kind of weights a path holds; raises `InputFileError` when none can be recognised."""
    if not path.exists():
        raise InputFileError(f"{path}: no such file or folder")
    suffix = path.suffix.lower()
    if path.is_file() and suffix in PICKLES:
        raise InputFileError(f"{path}: a {path.suffix} file can hold code that runs when it is read; {INSTEAD}")
    if path.is_file() and suffix in (".pt", ".safetensors", ".gguf"):
        return suffix[1:]  # type: ignore[return-value]  # one of the three just tested
    steps = path / "checkpoints"
    if steps.is_dir() and (any(entry.name.isdigit() for entry in steps.iterdir()) or not _is_hf(path)):
        return "orbax"
    if _is_hf(path):
        return "hf"
    if run_folder(path):
        return "orbax"
    if path.is_dir() and any(path.glob("pytorch_model*.bin")):
        raise InputFileError(f"{path}: holds pytorch_model.bin only, which can run code when it is read; {INSTEAD}")
    raise InputFileError(
        f"{path}: not recognised as weights; give a run folder (or one step under its checkpoints/), "
        "a Hugging Face folder with model.safetensors, or a .pt, .safetensors or .gguf file"
    )


def _is_hf(path: Path) -> bool:
    """Whether a path is a folder with weights by Hugging Face's names."""
    return path.is_dir() and any(path.glob("model*.safetensors"))


def read(path: str | Path, *, allow_unverified: bool = False, mapped: bool = False) -> Bundle:
    """The weights at a path of any kind, checked, in Hugging Face's names and layout at their stored precision.

    Where there is no such path it may be a model's name on the Hugging Face hub, see `hub.locate`.
    A checkpoint whose files are not what was written is a `CheckpointError`; one without a manifest too, unless
    `allow_unverified`. `mapped`: for who copies the tensors at once; those of a safetensors file are views of it.
    """
    path = locate(path)
    readers = {
        "orbax": functools.partial(read_orbax, allow_unverified=allow_unverified),
        "hf": functools.partial(huggingface.read_hf, mapped=mapped),
        "pt": torch_file.read_pt,
        "safetensors": functools.partial(safetensors_file.read_safetensors_file, mapped=mapped),
        "gguf": gguf_reader.read_gguf,
    }
    return check(readers[kind_of(path)](path), path)


def write(path: str | Path, bundle: Bundle, kind: Kind, *, gguf_type: GgufType | None = None) -> None:
    """Writes checked weights as `kind`; the target must not exist, and is complete or not there at all.

    `gguf_type` is how a GGUF stores its matrices (None: what keeps every bit) and goes with no other kind.
    """
    path = Path(path)
    if gguf_type is not None and kind != "gguf":
        raise UsageError(f"{path}: type {gguf_type} is for GGUF files, not for kind {kind}")
    writers = {
        "orbax": write_orbax,
        "hf": huggingface.write_hf,
        "pt": torch_file.write_pt,
        "safetensors": safetensors_file.write_safetensors_file,
        "gguf": functools.partial(gguf_writer.write_gguf, kind=gguf_type),
    }
    if kind not in writers:
        raise UsageError(f"{path}: cannot write kind {kind!r}, only {', '.join(writers)}")
    writers[kind](path, check(bundle, path))


def generation_of(path: Path) -> GenerationConfig:
    """How weights ask to be written with, without reading a tensor; greedy for the kinds that would import_optional that."""
    kind, source = kind_of(path), f"{path}: generation_config"
    if kind == "gguf":
        config, values = gguf_reader.read_generation(path)
        return GenerationConfig.from_values(values, config, source)
    if kind not in ("hf", "orbax"):
        return UNKNOWN
    folder = run_folder(path) or path
    config = read_config(folder / "config.json")
    return GenerationConfig.from_values(generation_of_folder(folder, config), config, source)
