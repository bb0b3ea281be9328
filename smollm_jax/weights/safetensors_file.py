"""Safetensors files: a reader that validates the whole header first, and a writer that reads back what it wrote."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from smollm_jax.config.generation_config import json_object, read_generation_config
from smollm_jax.config.hf_config import config_to_hf, parse_config
from smollm_jax.errors import InputFileError, StorageError, short_repr
from smollm_jax.runtime.atomic import replacing
from smollm_jax.runtime.files import file_size, one_line, parse_json
from smollm_jax.tokenizer.source import read_tokenizer_files
from smollm_jax.weights.bundle import Bundle, config_in_same_folder

MAX_HEADER = 16 << 20  # bytes; SmolLM2-135M's has 30 KB
DTYPES: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
DTYPES |= {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
DIGEST = "smollm_jax.sha256"  # the metadata key, in a `.pt` too


def digest(tensors: dict[str, np.ndarray]) -> str:
    """The sha256 over the names, dtypes, shapes and bytes of all tensors, sorted by name.

    It detects two swapped tensors of the same shape.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = native(tensors[name])
        total.update(json.dumps([name, tensor.dtype.name, tensor.shape]).encode())
        total.update(tensor.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def verify(tensors: dict[str, np.ndarray], expected: Any, path: Path) -> None:
    """Raises `InputFileError` if the digest stored in a file is not that of its tensors; None: it stores none."""
    if expected is not None and (actual := digest(tensors)) != expected:
        stored = short_repr(expected)
        raise InputFileError(f"{path}: tensors were changed or swapped: {DIGEST} is {stored}, they have {actual}")


def native(tensor: np.ndarray) -> np.ndarray:
    """The tensor in native byte order and C order, with its shape (`ascontiguousarray` would turn 0-d into 1-d)."""
    return np.asarray(tensor, dtype=tensor.dtype.newbyteorder("="), order="C")


def read_safetensors(path: Path, *, mapped: bool = False) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of one file; raises `InputFileError` if the file is malformed or its digest differs.

    `mapped`: the tensors are memory-mapped views of the file. Copy them soon: a later write to the file changes them
    after they were verified, and truncating it kills the process.
    """
    file_size(path)
    with path.open("rb") as file:
        metadata, spans = check_header(path, file)
        tensors = _map(path, file, spans) if mapped else _load(path)
    verify(tensors, metadata.get(DIGEST), path)
    return tensors, metadata


# Of a tensor in the file: dtype name, shape, first byte, end byte (exclusive).
TensorSpan = tuple[str, list[int], int, int]


def check_header(path: Path, file: BinaryIO) -> tuple[dict[str, str], dict[str, TensorSpan]]:
    """Metadata and tensor spans of a file; raises `InputFileError` unless the header accounts for every byte.

    safetensors checks most of it too, but accepts two tensors of the same name and does not name the invalid tensor.
    """

    def fail(what: str) -> InputFileError:
        return InputFileError(f"{path}: not a readable safetensors file: {what}")

    size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise fail(f"it claims a header of {length:,} bytes in a file of {size:,}; the limit is {MAX_HEADER:,}")
    header = file.read(length)
    try:
        entries = parse_json(header.decode("utf-8"), f"{path}: header")
    except UnicodeDecodeError as error:
        raise fail(f"byte {error.start} of the header is not UTF-8") from error
    metadata = entries.pop("__metadata__", {}) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise fail("the header is not a JSON object of tensors whose metadata are strings")
    spans: dict[str, TensorSpan] = {}
    for name, entry in entries.items():
        if not name.isprintable() or len(name) > 256:
            raise fail(f"a tensor is named {short_repr(name)}")
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)], **more} if (
                not more
            ):
                pass
            case _:
                raise fail(f"tensor {name} is described by {short_repr(entry)}, not by dtype, shape and data_offsets")
        if dtype not in DTYPES:
            raise fail(f"tensor {name} has dtype {short_repr(dtype)}, only {', '.join(DTYPES)} are supported")
        if len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
            raise fail(f"tensor {name} has shape {short_repr(shape)}")
        if math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize != end - begin:
            raise fail(f"tensor {name}, {dtype} {shape}, does not fill bytes {short_repr(begin)} to {short_repr(end)}")
        spans[name] = (dtype, shape, 8 + length + begin, 8 + length + end)
    expected = 8 + length
    for begin, end, name in sorted((begin, end, name) for name, (_, _, begin, end) in spans.items()):
        if begin != expected:
            raise fail(
                f"tensor {name} begins at byte {short_repr(begin - 8 - length)} of the data, "
                f"expected {expected - 8 - length}: a gap or an overlap"
            )
        expected = end
    if expected != size:
        raise fail(f"the file has {size:,} bytes, its header describes {short_repr(expected)}")
    return metadata, spans


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file: makes arrays contiguous, reads the file back and compares the bytes.

    safetensors 0.8.0 writes the memory of a non-contiguous array in the wrong order without an error
    (safetensors#825), and gives files the mode 0600 (#782).
    """
    arrays = {name: native(tensor) for name, tensor in tensors.items()}
    save_file(arrays, path, metadata={"format": "pt", DIGEST: digest(arrays)} | metadata)
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        file.seek(8)
        file.write(_sorted_metadata(header))
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    written = _load(path)
    for name, tensor in arrays.items():
        if (written[name].dtype, written[name].shape) != (tensor.dtype, tensor.shape) or (
            written[name].tobytes() != tensor.tobytes()
        ):
            raise StorageError(f"{path}: tensor {name} reads back different from what was written")


def safetensors_bytes(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """The content of a small safetensors file: equal tensors and metadata give equal bytes."""
    arrays = {name: native(tensor) for name, tensor in sorted(tensors.items())}
    content = save(arrays, {"format": "pt", DIGEST: digest(arrays)} | metadata)
    length = int.from_bytes(content[:8], "little")
    return content[:8] + _sorted_metadata(content[8 : 8 + length]) + content[8 + length :]


def _sorted_metadata(header: bytes) -> bytes:
    """The header with its metadata sorted: safetensors orders them anew each time; equal weights make equal files."""
    entries = json.loads(header)
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    ordered = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode().ljust(len(header))
    if len(ordered) != len(header):
        raise StorageError("a safetensors header changed its length when its metadata were sorted")
    return ordered


def _map(path: Path, file: BinaryIO, spans: dict[str, TensorSpan]) -> dict[str, np.ndarray]:
    """Views of the open file; opening `path` again could open another file that replaced it."""
    try:
        data = np.asarray(np.memmap(file, np.uint8, "r"))
        return {name: data[a:b].view(DTYPES[dtype]).reshape(shape) for name, (dtype, shape, a, b) in spans.items()}
    except (OSError, ValueError) as error:
        raise InputFileError(f"{path}: not a readable safetensors file: {one_line(error)}") from error


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError, TypeError, ValueError, KeyError, AttributeError, MemoryError) as error:
        raise InputFileError(f"{path}: not a readable safetensors file: {one_line(error)}") from error


def read_safetensors_file(path: Path, *, mapped: bool = False) -> Bundle:
    """A single safetensors file; its config is in its metadata, or in config.json in the same folder."""
    tensors, metadata = read_safetensors(path, mapped=mapped)
    where = f"{path}: metadata 'generation_config'"
    if "config" in metadata:
        config = parse_config(parse_json(metadata["config"], f"{path}: metadata 'config'"), path)
        text = metadata.get("generation_config")
        generation = None if text is None else json_object(parse_json(text, where), where)
    else:
        config, generation = config_in_same_folder(path), read_generation_config(path.parent)
    return Bundle(tensors, config, read_tokenizer_files(path.parent), metadata.get("origin", ""), generation)


def write_safetensors_file(path: Path, bundle: Bundle) -> None:
    """Writes one file with Hugging Face's tensor names and the config in its metadata."""
    metadata = {"config": json.dumps(config_to_hf(bundle.config, bundle.dtype)), "origin": bundle.origin}
    if bundle.generation_config is not None:
        metadata["generation_config"] = json.dumps(bundle.generation_config)
    with replacing(path) as temporary:
        write_safetensors(temporary, bundle.tensors, metadata)
