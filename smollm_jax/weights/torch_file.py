"""What a `.pt` file may be, checked around `torch.load`, and tensors to arrays and back, bit for bit.

torch is imported only where a tensor is at hand.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from smollm_jax.config.generation_config import json_object, read_generation_config
from smollm_jax.config.hf_config import config_to_hf, parse_config
from smollm_jax.errors import InputFileError, StorageError, short_repr
from smollm_jax.runtime.atomic import replacing
from smollm_jax.runtime.files import file_size, import_optional, one_line
from smollm_jax.tokenizer.source import read_tokenizer_files
from smollm_jax.weights.bundle import Bundle, config_beside
from smollm_jax.weights.safetensors_file import DIGEST, digest, native, verify
from smollm_jax.weights.tensor_names import FIRST_LAYER

MAX_PICKLE = 2 << 20  # bytes of the pickle in a .pt, which holds names and shapes; SmolLM2-135M's has 40 KB


def check_archive(path: Path) -> None:
    """Raises `InputFileError` unless a file is a zip archive as torch.save writes it: not packed, a small pickle."""
    size = file_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:  # no zip, or one of a kind unknown
        raise InputFileError(
            f"{path}: not a torch file ({one_line(error)}), and nothing else is unpickled, because a pickle can run "
            "code; give a .safetensors file, or save the state dict with torch.save of PyTorch 1.6 or later"
        ) from error
    if sum(entry.file_size for entry in entries) > size:  # torch.save packs none, a packed one grows a thousandfold
        raise InputFileError(f"{path}: not written by torch.save: its entries are packed or overlap")
    if any(entry.filename.endswith("data.pkl") and entry.file_size > MAX_PICKLE for entry in entries):
        raise InputFileError(f"{path}: data.pkl has over {MAX_PICKLE:,} bytes, too many for a state dict of tensors")


def state_dict_of(content: Any, path: Path) -> tuple[dict[Any, Any], dict[str, Any]]:
    """The one state dict in what `torch.load` gave, and what a file of ours (a "state_dict" at the top) says of it.

    Trainers keep it beside the optimizer's state: under "state_dict" (Lightning), "model", "module" (DeepSpeed),
    "model_state_dict", or a level deeper. `InputFileError` when there is none, or when there are several models.
    """
    about = content if isinstance(content, dict) and "state_dict" in content else {}
    state = about.get("state_dict", content)
    if _holds_tensors(state):
        return state, about
    models = dict(_models(content, "", {id(content)}, depth=3))
    if len(models) > 1:
        names = ", ".join(models)
        raise InputFileError(f"{path}: holds several models, under {names}: save the one that is meant alone")
    if not models:
        raise InputFileError(f"{path}: holds no state dict of tensors")
    config = content.get("config")
    described = isinstance(config, dict) and "hidden_size" in config  # a trainer's own settings say nothing of it
    return next(iter(models.values())), {"config": config} if described else {}


def _holds_tensors(content: Any) -> bool:
    import torch

    return isinstance(content, dict) and all(isinstance(tensor, torch.Tensor) for tensor in content.values())


def _models(content: Any, where: str, seen: set[int], depth: int) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The state dicts of Llamas in nested dicts, by where they are; a dict that is there twice counts once."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if not isinstance(value, dict) or id(value) in seen:
            continue
        seen.add(id(value))
        place = f"{where}{short_repr(key)}"
        if _holds_tensors(value) and any(type(name) is str and name.endswith(FIRST_LAYER) for name in value):
            yield place, value
        elif depth > 1:
            yield from _models(value, f"{place}.", seen, depth - 1)


def checked_from_torch(name: Any, tensor: Any, path: Path) -> np.ndarray:
    """A loaded tensor as an array; raises `InputFileError` naming one that is not plain numbers in the file."""
    if type(name) is not str or not name.isprintable() or len(name) > 256:
        raise InputFileError(f"{path}: a tensor is named {short_repr(name)}")
    try:
        # A stride of 0 makes terabytes of one stored number.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputFileError(f"{path}: tensor {name} has shape {list(tensor.shape)}, the file stores fewer numbers")
        return from_torch(tensor)
    except (TypeError, RuntimeError, NotImplementedError) as error:  # sparse, quantised, meta, float8
        raise InputFileError(f"{path}: tensor {name} is no plain array: {one_line(error)}") from error


def from_torch(tensor: Any) -> np.ndarray:
    """A CPU tensor as a NumPy array; bfloat16 bit for bit."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16 of its own
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray) -> Any:
    """A NumPy array as a tensor that owns its memory; bfloat16 bit for bit."""
    import torch

    array = native(array).copy()  # torch must not share memory it may write to
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def read_pt(path: Path) -> Bundle:
    """The one model in a `.pt` file: what `write_pt` writes, a bare state dict, or one in a training checkpoint.

    Its config is in the file or in a config.json beside it. Pickled code is never run.
    """
    check_archive(path)
    torch = import_optional("torch", path)

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, pickle's among them
        said = one_line(error).split(". ")[0]
        raise InputFileError(
            f"{path}: not a weights-only torch file ({said}); give a .safetensors file, or a .pt of tensors alone"
        ) from error
    state, about = state_dict_of(content, path)
    tensors = {name: checked_from_torch(name, tensor, path) for name, tensor in state.items()}
    origin = about.get("origin", "")
    if type(origin) is not str:
        raise InputFileError(f"{path}: origin must be a string, got {short_repr(origin)}")
    verify(tensors, about.get(DIGEST), path)
    config = about.get("config")
    values = config_beside(path) if config is None else parse_config(config, path)
    if (generation := about.get("generation_config")) is not None:
        generation = json_object(generation, f"{path}: generation_config")
    elif config is None:
        generation = read_generation_config(path.parent)
    return Bundle(tensors, values, read_tokenizer_files(path.parent), origin, generation)


def write_pt(path: Path, bundle: Bundle) -> None:
    """The PyTorch twin's weights as {"config", "origin", "state_dict"} and their digest, read back and compared."""
    torch = import_optional("torch", path)

    state = {name: to_torch(tensor) for name, tensor in bundle.tensors.items()}
    made = digest(bundle.tensors)
    with replacing(path) as temporary:
        content = {"config": config_to_hf(bundle.config, bundle.dtype), "origin": bundle.origin, DIGEST: made}
        content["generation_config"] = bundle.generation_config
        try:
            torch.save(content | {"state_dict": state}, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise StorageError(f"{path}: cannot be written: {error}") from error
        written = torch.load(temporary, weights_only=True)["state_dict"]
        if digest({name: from_torch(tensor) for name, tensor in written.items()}) != made:
            raise StorageError(f"{path}: tensors read back different from what was written")
