"""The file formats weights come in: Hugging Face folder, safetensors file, torch `.pt`, GGUF.

Every reader gives, and every writer takes, the same `Bundle`: Hugging Face's tensor names and layout as NumPy arrays.
Framework-free: torch is imported for `.pt` only, gguf for `.gguf` only. What the tensors must be is checked in
`weights.py`; here only the container is.
"""

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from smollm_jax import gguf_file, gguf_writer, integrity
from smollm_jax.config import Config, shown
from smollm_jax.config_keys import generation_defaults
from smollm_jax.errors import InputFileError, SmolLMError, StorageError, UsageError
from smollm_jax.files import (
    need,
    one_line,
    parse_config,
    parse_json,
    read_config,
    read_json,
    read_text,
)
from smollm_jax.safetensors_file import DIGEST, digest, read_safetensors, verify, write_safetensors
from smollm_jax.tokenizer_source import read_tokenizer_files
from smollm_jax.torch_file import check_archive, checked_from_torch, from_torch, state_dict_of, to_torch


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


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary sibling to write; renamed to `target` when the block ends well, removed when it does not.

    Raises `UsageError` if `target` exists: nothing is overwritten.
    """
    if target.exists():
        raise UsageError(f"{target}: exists already; name another target or remove it first")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:  # on the disk before it has its name
            integrity.sync(path)
        os.rename(temporary, target)
        integrity.sync(target.parent)
    except SmolLMError as error:
        raise type(error)(str(error).replace(str(temporary), str(target))) from error
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        reason = str(error).replace(str(temporary), str(target))
        raise StorageError(f"{target}: cannot be written: {reason}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ safetensors


def read_safetensors_file(path: Path, *, mapped: bool = False) -> Bundle:
    """A lone safetensors file; its config is in its metadata, or in a config.json beside it."""
    tensors, metadata = read_safetensors(path, mapped=mapped)
    where = f"{path}: metadata 'generation_config'"
    if "config" in metadata:
        config = parse_config(parse_json(metadata["config"], f"{path}: metadata 'config'"), path)
        own = metadata.get("generation_config")
        generation = None if own is None else _object(parse_json(own, where), where)
    else:
        config, generation = _config_beside(path), read_generation_config(path.parent)
    return Bundle(tensors, config, read_tokenizer_files(path.parent), metadata.get("origin", ""), generation)


def write_safetensors_file(path: Path, bundle: Bundle) -> None:
    """The PyTorch twin's weights as one file that carries its config."""
    metadata = {"config": json.dumps(bundle.config.to_hf(bundle.dtype)), "origin": bundle.origin}
    if bundle.generation_config is not None:
        metadata["generation_config"] = json.dumps(bundle.generation_config)
    with replacing(path) as temporary:
        write_safetensors(temporary, bundle.tensors, metadata)


def _config_beside(path: Path) -> Config:
    if not (path.parent / "config.json").is_file():
        raise InputFileError(f"{path}: carries no config, and no config.json lies beside it")
    return read_config(path.parent / "config.json")


def read_generation_config(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's `generation_config.json`, None where there is none."""
    path = folder / "generation_config.json"
    return _object(read_json(path), path) if path.exists() else None


def _object(values: Any, where: object) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputFileError(f"{where}: must be a JSON object, got {shown(values)}")
    return values


# ----------------------------------------------------------------------------------------- Hugging Face folder


def read_hf(folder: Path, *, mapped: bool = False) -> Bundle:
    """A Hugging Face model folder: config.json, and model.safetensors or its shards."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() and index.exists():
        raise InputFileError(f"{folder}: holds both {whole.name} and {index.name}: remove the one that is not meant")
    tensors = _read_shards(index, mapped) if index.exists() else read_safetensors(whole, mapped=mapped)[0]
    config = read_config(folder / "config.json")
    origin = folder / "ORIGIN.txt"
    words = " ".join(read_text(origin).split()) if origin.exists() else ""
    return Bundle(tensors, config, read_tokenizer_files(folder), words, generation_of_folder(folder, config))


def generation_of_folder(folder: Path, config: Config) -> dict[str, Any] | None:
    """What a Hugging Face folder says of generation: in its own file, or as transformers 4 kept it, in config.json."""
    values = read_generation_config(folder)
    if values is None and (old := generation_defaults(read_json(folder / "config.json"))):
        return config.special_token_ids() | old
    return values


def _read_shards(index: Path, mapped: bool) -> dict[str, np.ndarray]:
    """The tensors of a folder with an index, each from the one shard it names."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise InputFileError(f"{index}: has no weight_map of tensor name to file name")
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise InputFileError(f"{index}: shard {shown(shard)} is not a plain file name")
        found, _ = read_safetensors(index.parent / shard, mapped=mapped)
        expected = {name for name, place in places.items() if place == shard}
        if differing := sorted(expected ^ set(found)):
            names = shown(", ".join(differing))
            raise InputFileError(f"{index}: {shard} and weight_map disagree on {len(differing)} tensor(s): {names}")
        tensors |= found
    return tensors


def write_hf(folder: Path, bundle: Bundle) -> None:
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` load, with the tied head left out."""
    config, generation = bundle.config, bundle.generation_config
    with replacing(folder) as temporary:
        temporary.mkdir()
        write_safetensors(temporary / "model.safetensors", bundle.tensors, {})
        texts = {
            "config.json": json.dumps(config.to_hf(bundle.dtype), indent=2) + "\n",
            "generation_config.json": generation_text(config, generation),
            "README.md": _model_card(bundle),
            "ORIGIN.txt": bundle.origin + "\n",
        }
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for name, content in bundle.tokenizer_files.items():
            (temporary / name).parent.mkdir(exist_ok=True)  # named chat templates lie in a folder of their own
            (temporary / name).write_bytes(content)


def generation_text(config: Config, generation: dict[str, Any] | None) -> str:
    """The text of a `generation_config.json`: the weights' own, else the ids that the config names."""
    return json.dumps(config.special_token_ids() if generation is None else generation, indent=2) + "\n"


def _model_card(bundle: Bundle) -> str:
    parameters = sum(tensor.size for tensor in bundle.tensors.values())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
        f"# SmolLM2, {parameters:,} parameters, {bundle.dtype}\n\n"
        f"Origin of the numbers: {bundle.origin or 'not recorded'}.\n"
    )


# -------------------------------------------------------------------------------------------------- torch .pt


def read_pt(path: Path) -> Bundle:
    """The one model in a `.pt` file: what `write_pt` writes, a bare state dict, or one in a training checkpoint.

    Its config is in the file or in a config.json beside it. Pickled code is never run.
    """
    check_archive(path)
    torch = need("torch", path)

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
        raise InputFileError(f"{path}: origin must be a string, got {shown(origin)}")
    verify(tensors, about.get(DIGEST), path)
    config = about.get("config")
    values = _config_beside(path) if config is None else parse_config(config, path)
    if (generation := about.get("generation_config")) is not None:
        generation = _object(generation, f"{path}: generation_config")
    elif config is None:
        generation = read_generation_config(path.parent)
    return Bundle(tensors, values, read_tokenizer_files(path.parent), origin, generation)


def write_pt(path: Path, bundle: Bundle) -> None:
    """The PyTorch twin's weights as {"config", "origin", "state_dict"} and their digest, read back and compared."""
    torch = need("torch", path)

    state = {name: to_torch(tensor) for name, tensor in bundle.tensors.items()}
    made = digest(bundle.tensors)
    with replacing(path) as temporary:
        content = {"config": bundle.config.to_hf(bundle.dtype), "origin": bundle.origin, DIGEST: made}
        content["generation_config"] = bundle.generation_config
        try:
            torch.save(content | {"state_dict": state}, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise StorageError(f"{path}: cannot be written: {error}") from error
        written = torch.load(temporary, weights_only=True)["state_dict"]
        if digest({name: from_torch(tensor) for name, tensor in written.items()}) != made:
            raise StorageError(f"{path}: tensors read back different from what was written")


# ------------------------------------------------------------------------------------------------------- GGUF


def read_gguf(path: Path) -> Bundle:
    """A Llama GGUF, dequantised to float32 by the `gguf` package, with the tokenizer in its metadata."""
    return Bundle(*gguf_file.read(path))


def write_gguf(path: Path, bundle: Bundle, kind: gguf_writer.GgufType | None = None) -> None:
    """A Llama GGUF with the tokenizer in its metadata, its matrices as `kind`: by default what keeps every bit."""
    with replacing(path) as temporary:
        gguf_writer.write(
            temporary,
            bundle.tensors,
            bundle.config,
            bundle.tokenizer_files,
            bundle.origin or path.stem,
            kind,
            bundle.generation_config,
        )
