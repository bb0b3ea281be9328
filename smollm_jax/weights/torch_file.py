"""`.pt` files, with checks before and after `torch.load`, and exact conversion between tensors and NumPy arrays.

torch is imported only by the functions that need it.
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
from smollm_jax.weights.bundle import Bundle, config_in_same_folder
from smollm_jax.weights.safetensors_file import DIGEST, digest, native, verify
from smollm_jax.weights.tensor_names import FIRST_LAYER

MAX_PICKLE = 2 << 20  # bytes of the pickle in a .pt, which stores names and shapes; SmolLM2-135M's has 40 KB


def check_archive(path: Path) -> None:
    """Raises `InputFileError` unless a file is a zip archive as torch.save writes it: uncompressed, a small pickle."""
    size = file_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (
        zipfile.BadZipFile,
        OSError,
        ValueError,
        NotImplementedError,
    ) as error:  # no zip, or a kind not known
        raise InputFileError(
            f"{path}: not a torch file ({one_line(error)}), and other pickles are refused, because a pickle can run "
            "code; give a .safetensors file, or save the state dict with torch.save of PyTorch 1.6 or later"
        ) from error
    # torch.save does not compress; a compressed entry could grow a thousandfold.
    if sum(entry.file_size for entry in entries) > size:
        raise InputFileError(f"{path}: not written by torch.save: its entries are compressed or overlap")
    if any(entry.filename.endswith("data.pkl") and entry.file_size > MAX_PICKLE for entry in entries):
        raise InputFileError(f"{path}: data.pkl has over {MAX_PICKLE:,} bytes, too many for a state dict of tensors")


def find_state_dict(content: Any, path: Path) -> tuple[dict[Any, Any], dict[str, Any]]:
    """The state dict in the result of `torch.load`, and the other entries of a file with a "state_dict" at the top.

    Trainers store it next to the optimizer state: under "state_dict" (Lightning), "model", "module" (DeepSpeed),
    "model_state_dict", or one level deeper. `InputFileError` if there is none, or if there are several models.
    """
    metadata = content if isinstance(content, dict) and "state_dict" in content else {}
    state = metadata.get("state_dict", content)
    if _holds_tensors(state):
        return state, metadata
    models = dict(_models(content, "", {id(content)}, depth=3))
    if len(models) > 1:
        names = ", ".join(models)
        raise InputFileError(f"{path}: holds several models, under {names}: save only the one you want")
    if not models:
        raise InputFileError(f"{path}: holds no state dict of tensors")
    config = content.get("config")
    is_model_config = isinstance(config, dict) and "hidden_size" in config  # not a trainer's own settings
    return next(iter(models.values())), {"config": config} if is_model_config else {}


def _holds_tensors(content: Any) -> bool:
    import torch

    return isinstance(content, dict) and all(isinstance(tensor, torch.Tensor) for tensor in content.values())


def _models(content: Any, prefix: str, seen: set[int], depth: int) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The Llama state dicts in nested dicts, each with its key path; a dict that occurs twice counts once."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if not isinstance(value, dict) or id(value) in seen:
            continue
        seen.add(id(value))
        key_path = f"{prefix}{short_repr(key)}"
        if _holds_tensors(value) and any(type(name) is str and name.endswith(FIRST_LAYER) for name in value):
            yield key_path, value
        elif depth > 1:
            yield from _models(value, f"{key_path}.", seen, depth - 1)


def checked_from_torch(name: Any, tensor: Any, path: Path) -> np.ndarray:
    """A loaded tensor as an array; raises `InputFileError` unless it is a dense array that the file stores in full."""
    if type(name) is not str or not name.isprintable() or len(name) > 256:
        raise InputFileError(f"{path}: a tensor is named {short_repr(name)}")
    try:
        # A stride of 0 could expand one stored value to terabytes.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputFileError(
                f"{path}: tensor {name} has shape {list(tensor.shape)}, but the file stores fewer values"
            )
        return from_torch(tensor)
    except (TypeError, RuntimeError, NotImplementedError) as error:  # sparse, quantised, meta, float8
        raise InputFileError(f"{path}: tensor {name} is not a plain dense array: {one_line(error)}") from error


def from_torch(tensor: Any) -> np.ndarray:
    """A CPU tensor as a NumPy array with the same bits, also for bfloat16."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # which `Tensor.numpy` does not support
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray) -> Any:
    """A NumPy array as a tensor with the same bits and its own memory, also for bfloat16."""
    import torch

    array = native(array).copy()  # torch must not share memory it may write to
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def read_pt(path: Path) -> Bundle:
    """The model in a `.pt` file written by `write_pt`, a bare state dict, or a training checkpoint.

    The config is in the file or in config.json in the same folder. Pickled code is never run.
    """
    check_archive(path)
    torch = import_optional("torch", path)

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types, pickle's among them
        reason = one_line(error).split(". ")[0]
        raise InputFileError(
            f"{path}: not a weights-only torch file ({reason}); give a .safetensors file, or a .pt of tensors only"
        ) from error
    state, metadata = find_state_dict(content, path)
    tensors = {name: checked_from_torch(name, tensor, path) for name, tensor in state.items()}
    origin = metadata.get("origin", "")
    if type(origin) is not str:
        raise InputFileError(f"{path}: origin must be a string, got {short_repr(origin)}")
    verify(tensors, metadata.get(DIGEST), path)
    config = metadata.get("config")
    values = config_in_same_folder(path) if config is None else parse_config(config, path)
    if (generation := metadata.get("generation_config")) is not None:
        generation = json_object(generation, f"{path}: generation_config")
    elif config is None:
        generation = read_generation_config(path.parent)
    return Bundle(tensors, values, read_tokenizer_files(path.parent), origin, generation)


def write_pt(path: Path, bundle: Bundle) -> None:
    """Writes {"config", "origin", "state_dict", ...} with a digest of the tensors, reads it back and compares."""
    torch = import_optional("torch", path)

    state = {name: to_torch(tensor) for name, tensor in bundle.tensors.items()}
    checksum = digest(bundle.tensors)
    with replacing(path) as temporary:
        content = {"config": config_to_hf(bundle.config, bundle.dtype), "origin": bundle.origin, DIGEST: checksum}
        content["generation_config"] = bundle.generation_config
        try:
            torch.save(content | {"state_dict": state}, temporary)
        except RuntimeError as error:  # torch's error for a full disk
            raise StorageError(f"{path}: cannot be written: {error}") from error
        written = torch.load(temporary, weights_only=True)["state_dict"]
        if digest({name: from_torch(tensor) for name, tensor in written.items()}) != checksum:
            raise StorageError(f"{path}: tensors read back different from what was written")
