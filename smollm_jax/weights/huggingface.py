"""A Hugging Face model folder, read and written."""

import json
from pathlib import Path

import numpy as np

from smollm_jax.config.generation_config import generation_of_folder, generation_text
from smollm_jax.config.hf_config import config_to_hf, read_config
from smollm_jax.errors import InputFileError, short_repr
from smollm_jax.runtime.atomic import replacing
from smollm_jax.runtime.files import read_json, read_text
from smollm_jax.tokenizer.source import read_tokenizer_files
from smollm_jax.weights.bundle import Bundle
from smollm_jax.weights.safetensors_file import read_safetensors, write_safetensors


def read_hf(folder: Path, *, mapped: bool = False) -> Bundle:
    """A Hugging Face model folder: config.json, and model.safetensors or its shards."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() and index.exists():
        raise InputFileError(f"{folder}: holds both {whole.name} and {index.name}: remove the one you do not want")
    tensors = _read_shards(index, mapped) if index.exists() else read_safetensors(whole, mapped=mapped)[0]
    config = read_config(folder / "config.json")
    origin = folder / "ORIGIN.txt"
    origin_text = " ".join(read_text(origin).split()) if origin.exists() else ""
    return Bundle(tensors, config, read_tokenizer_files(folder), origin_text, generation_of_folder(folder, config))


def _read_shards(index: Path, mapped: bool) -> dict[str, np.ndarray]:
    """The tensors of all shards, each of which must hold exactly the tensors that the index lists for it."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputFileError(f"{index}: has no weight_map of tensor name to file name")
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise InputFileError(f"{index}: shard {short_repr(shard)} is not a plain file name")
        shard_tensors, _ = read_safetensors(index.parent / shard, mapped=mapped)
        expected = {name for name, file in weight_map.items() if file == shard}
        if differing := sorted(expected ^ set(shard_tensors)):
            names = short_repr(", ".join(differing))
            raise InputFileError(f"{index}: {shard} and weight_map disagree on {len(differing)} tensor(s): {names}")
        tensors |= shard_tensors
    return tensors


def write_hf(folder: Path, bundle: Bundle) -> None:
    """Writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` load, without a tied head."""
    config, generation = bundle.config, bundle.generation_config
    with replacing(folder) as temporary:
        temporary.mkdir()
        write_safetensors(temporary / "model.safetensors", bundle.tensors, {})
        texts = {
            "config.json": json.dumps(config_to_hf(config, bundle.dtype), indent=2) + "\n",
            "generation_config.json": generation_text(config, generation),
            "README.md": _model_card(bundle),
            "ORIGIN.txt": bundle.origin + "\n",
        }
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for name, content in bundle.tokenizer_files.items():
            (temporary / name).parent.mkdir(exist_ok=True)  # named chat templates are in a subfolder
            (temporary / name).write_bytes(content)


def _model_card(bundle: Bundle) -> str:
    parameters = sum(tensor.size for tensor in bundle.tensors.values())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
        f"# SmolLM2, {parameters:,} parameters, {bundle.dtype}\n\n"
        f"Origin of the numbers: {bundle.origin or 'not recorded'}.\n"
    )
