"""Weights of any format: `read` and `write` convert, `kind_of` detects the format of a path.

Each format has its module: `huggingface`, `safetensors_file`, `torch_file`, `gguf_reader` and `gguf_writer`,
`orbax_checkpoint`, and `adapted` for a LoRA adapter in peft's files. A framework is imported only by the formats that
need it.
"""

import functools
from pathlib import Path
from typing import Literal

from smollm_jax.config.generation_config import UNKNOWN, GenerationConfig, generation_of_folder
from smollm_jax.config.hf_config import read_config
from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.tokenizer.source import run_folder
from smollm_jax.weights import gguf_reader, gguf_writer, huggingface, safetensors_file, torch_file
from smollm_jax.weights.adapted import apply_adapter, read_peft
from smollm_jax.weights.adapter import is_adapter
from smollm_jax.weights.bundle import Bundle
from smollm_jax.weights.gguf_writer import GgufType
from smollm_jax.weights.hub import locate
from smollm_jax.weights.mapping import check
from smollm_jax.weights.orbax_checkpoint import read_orbax, write_orbax

Kind = Literal["orbax", "hf", "pt", "safetensors", "gguf", "peft"]  # "peft", an adapter and its base, is read only

PICKLES = (".bin", ".npy", ".npz", ".pkl", ".pickle", ".pth", ".ckpt")
PICKLE_HINT = "give model.safetensors, or a .pt that torch.save wrote from the state dict (loaded as tensors only)"


def kind_of(path: Path) -> Kind:
    """The format of the weights at a path; raises `InputFileError` if it is not recognised."""
    if not path.exists():
        raise InputFileError(f"{path}: no such file or folder")
    suffix = path.suffix.lower()
    if path.is_file() and suffix in PICKLES:
        raise InputFileError(f"{path}: a {path.suffix} file can run code when it is loaded; {PICKLE_HINT}")
    if path.is_file() and suffix in (".pt", ".safetensors", ".gguf"):
        return suffix[1:]  # type: ignore[return-value]  # one of the three just tested
    if is_adapter(path):
        return "peft"
    steps = path / "checkpoints"
    if steps.is_dir() and (any(entry.name.isdigit() for entry in steps.iterdir()) or not _is_hf(path)):
        return "orbax"
    if _is_hf(path):
        return "hf"
    if run_folder(path):
        return "orbax"
    if path.is_dir() and any(path.glob("pytorch_model*.bin")):
        raise InputFileError(
            f"{path}: holds pytorch_model.bin only, which can run code when it is loaded; {PICKLE_HINT}"
        )
    raise InputFileError(
        f"{path}: not recognised as weights; give a run folder (or one step under its checkpoints/), "
        "a Hugging Face folder with model.safetensors, or a .pt, .safetensors or .gguf file"
    )


def _is_hf(path: Path) -> bool:
    """Whether a path is a folder with `model*.safetensors` files."""
    return path.is_dir() and any(path.glob("model*.safetensors"))


def read(
    path: str | Path, *, allow_unverified: bool = False, mapped: bool = False, adapter: Path | None = None
) -> Bundle:
    """The validated weights at a path of any kind, with Hugging Face's names and layout, at their stored precision.

    A path that does not exist may be the name of a model on the Hugging Face hub, see `hub.locate`.
    Raises `CheckpointError` for a checkpoint whose files do not match its manifest, or that has none unless
    `allow_unverified`. `mapped`: tensors of safetensors files are memory-mapped, so copy them before the file changes.
    `adapter`: a LoRA adapter in peft's files, or a run that trained one, which is merged into them.
    """
    path = locate(path)
    readers = {
        "orbax": functools.partial(read_orbax, allow_unverified=allow_unverified),
        "hf": functools.partial(huggingface.read_hf, mapped=mapped),
        "pt": torch_file.read_pt,
        "safetensors": functools.partial(safetensors_file.read_safetensors_file, mapped=mapped),
        "gguf": gguf_reader.read_gguf,
        "peft": read_peft,
    }
    bundle = check(readers[kind_of(path)](path), path)
    return bundle if adapter is None else apply_adapter(bundle, adapter)


def write(path: str | Path, bundle: Bundle, kind: Kind, *, gguf_type: GgufType | None = None) -> None:
    """Validates weights and writes them as `kind`, atomically; the target must not exist.

    `gguf_type` is the type of a GGUF's matrices (None: the lossless one) and is an error with other kinds.
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
    """The generation settings of weights, without reading tensors; greedy for kinds that would have to read them."""
    kind, source = kind_of(path), f"{path}: generation_config"
    if kind == "gguf":
        config, values = gguf_reader.read_generation(path)
        return GenerationConfig.from_values(values, config, source)
    if kind not in ("hf", "orbax"):
        return UNKNOWN
    folder = run_folder(path) or path
    config = read_config(folder / "config.json")
    return GenerationConfig.from_values(generation_of_folder(folder, config), config, source)
