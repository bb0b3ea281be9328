"""Weights with a LoRA adapter merged into them: of a run that trained one, and of a folder in peft's layout."""

from pathlib import Path

import numpy as np

from smollm_jax.config import Config
from smollm_jax.config.finetune_recipe import FinetuneRecipe
from smollm_jax.config.hf_config import read_config
from smollm_jax.errors import InputFileError
from smollm_jax.runs.provenance import Provenance
from smollm_jax.tokenizer.source import read_tokenizer_files
from smollm_jax.weights.adapter import (
    ADAPTER,
    CONFIG,
    Adapter,
    fingerprint,
    is_adapter,
    merge_adapter,
    projection_shape,
    read_adapter,
    read_adapter_config,
)
from smollm_jax.weights.bundle import Bundle


def read_base(base: str, sha256: str, source: Path) -> Bundle:
    """The weights at `base` that the adapter of `source` was trained on.

    Raises `InputFileError` if they are missing or, where `sha256` is not "", have another fingerprint.
    """
    from smollm_jax.weights.convert import read  # which imports this module
    from smollm_jax.weights.hub import is_name

    if not Path(base).exists() and not is_name(Path(base)):
        raise InputFileError(f"{source}: its adapter was trained on {base}, which does not exist")
    try:
        bundle = read(base)
    except RecursionError as error:
        raise InputFileError(f"{source}: its adapter was trained on {base}, which leads back to itself") from error
    if sha256 and fingerprint(bundle) != sha256:
        raise InputFileError(f"{source}: the weights {base}, which its adapter was trained on, have changed since")
    return bundle


def read_peft(folder: Path) -> Bundle:
    """The base weights that a folder in peft's layout names, with the adapter merged into them.

    Raises `InputFileError` if it names no base, if the base does not exist or if the adapter does not fit it.
    """
    base = _base_of(folder)
    chain = [folder.resolve()]
    while is_adapter(Path(base)):  # an adapter trained on an adapter
        chain.append(Path(base).resolve())
        if chain[-1] in chain[:-1]:
            raise InputFileError(f"{folder / CONFIG}: base_model_name_or_path {base} leads back to an adapter itself")
        base = _base_of(Path(base))
    bundle = read_base(_base_of(folder), "", folder)
    bundle = merge_adapter(bundle, read_adapter(folder, bundle.config))
    bundle.tokenizer_files = read_tokenizer_files(folder) or bundle.tokenizer_files
    return bundle


def find_adapter(path: Path) -> Path:
    """The folder in peft's layout at `path`, or that of the run at `path`; raises `InputFileError` if there is none."""
    for folder in (path, path / ADAPTER):
        if is_adapter(folder):
            return folder
    raise InputFileError(f"{path}: no adapter: neither it nor {path / ADAPTER} has an {CONFIG}")


def apply_adapter(bundle: Bundle, path: Path) -> Bundle:
    """The weights with the adapter at `path`, a folder in peft's layout or a run, merged into them.

    Raises `InputFileError` if it does not fit, or records that it was trained on other weights.
    """
    folder = find_adapter(path)
    adapter = read_adapter(folder, bundle.config)
    if adapter.base_sha256 and adapter.base_sha256 != fingerprint(bundle):
        raise InputFileError(f"{folder}: the adapter was trained on {adapter.base}, not on these weights")
    return merge_adapter(bundle, adapter)


def adapter_and_config(path: Path) -> tuple[Adapter, Config]:
    """The adapter of a run, or in peft's layout, and the config of the model that it is for."""
    folder, config = find_adapter(path), path / "config.json"
    config = read_config(config) if config.is_file() else read_base(_base_of(folder), "", folder).config
    return read_adapter(folder, config), config


def merge_run(run: Path, parameters: dict[str, np.ndarray], provenance: Provenance) -> Bundle:
    """The weights of a run that trained an adapter, from its checkpoint's parameters by path and its provenance.

    Raises `InputFileError` as `read_base` does, and for parameters that are not those of the run's recipe.
    """
    recipe, config = provenance.recipe, provenance.config
    if not isinstance(recipe, FinetuneRecipe):
        raise InputFileError(f"{run}: its recipe has an adapter but no method")
    targets, rank = recipe.lora_targets.split(","), recipe.lora_rank
    expected: dict[str, tuple[int, ...]] = {}
    for target in targets:
        try:
            out_size, in_size = projection_shape(config, target)
        except KeyError as error:
            raise InputFileError(f"{run}: its recipe's lora_targets name {error}, which is no projection") from error
        expected[f"{target}.a"] = (config.num_hidden_layers, rank, in_size)
        expected[f"{target}.b"] = (config.num_hidden_layers, out_size, rank)
    shapes = {name: array.shape for name, array in parameters.items()}
    if differing := sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name)):
        raise InputFileError(f"{run}: its adapter has other parameters than its recipe: {', '.join(differing)}")
    bundle = read_base(provenance.start_from, recipe.base_sha256, run)
    pairs = {target: (parameters[f"{target}.a"], parameters[f"{target}.b"]) for target in targets}
    adapter = Adapter(pairs, rank, recipe.lora_alpha, recipe.rslora, provenance.start_from)
    bundle = merge_adapter(bundle, adapter)
    bundle.config = config
    return bundle


def _base_of(folder: Path) -> str:
    base = read_adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputFileError(f"{folder / CONFIG}: names no base_model_name_or_path")
    return base
