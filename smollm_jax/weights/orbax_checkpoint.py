"""A run folder with Orbax checkpoints as weights, read and written."""

from pathlib import Path
from typing import Any

import einops

from smollm_jax.config import Config
from smollm_jax.config.generation_config import read_generation_config
from smollm_jax.config.hf_config import read_config
from smollm_jax.errors import CheckpointError, InputFileError, short_repr
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runs.folder import write_run_files
from smollm_jax.runs.provenance import Provenance, from_json
from smollm_jax.runtime.atomic import replacing
from smollm_jax.tokenizer.source import read_tokenizer_files, run_folder
from smollm_jax.weights.adapted import merge_run
from smollm_jax.weights.bundle import Bundle
from smollm_jax.weights.mapping import from_hf, rules, to_hf


def read_orbax(path: Path, allow_unverified: bool) -> Bundle:
    parent_run = run_folder(path)
    step, run = (None, path) if parent_run is None else (int(path.name), parent_run)
    config = read_config(run / "config.json")
    with CheckpointStore(run / "checkpoints", create=False) as store:
        step = store.latest_step() if step is None else step
        store.verify(step, item="params", allow_unverified=allow_unverified)
        meta = store.meta(step)
        parameters = store.read(step, "params")
    try:
        saved_config = from_json(Config, meta["config"]) if "config" in meta else config
        provenance = Provenance.from_meta(meta) if _has_adapter(meta.get("recipe", {})) else None
    except CheckpointError as error:
        raise CheckpointError(f"{run / 'checkpoints'}: step {step}: {error}") from error
    if saved_config != config:
        fields = [name for name in vars(config) if getattr(config, name) != getattr(saved_config, name)]
        changes = [f"{name}: {getattr(saved_config, name)!r} -> {getattr(config, name)!r}" for name in fields]
        raise InputFileError(f"{run / 'config.json'}: changed since step {step} was saved: {'; '.join(changes)}")
    origin = str(meta.get("origin") or f"step {step} of run {run.name}")
    if provenance is not None:
        merged = merge_run(run, parameters, provenance)
        origin = f"{origin}, a LoRA adapter of {provenance.start_from}"
        return Bundle(merged.tensors, config, read_tokenizer_files(run), origin, read_generation_config(run))
    expected = {name for name, _ in rules(config).values()}
    if set(parameters) != expected:
        differing = sorted(set(parameters) ^ expected)
        raise InputFileError(f"{path}: step {step} has other parameters than its config: {', '.join(differing)}")
    try:
        tensors = to_hf(parameters, config)
    except einops.EinopsError as error:
        raise InputFileError(f"{path}: step {step} has a parameter of the wrong shape: {error}") from error
    return Bundle(tensors, config, read_tokenizer_files(run), origin, read_generation_config(run))


def _has_adapter(recipe: Any) -> bool:
    """Whether a run trained an adapter, by its recipe; one without is read whatever the other fields."""
    if not isinstance(recipe, dict):
        raise CheckpointError(f"its recipe is {short_repr(recipe)}, not an object")
    return bool(recipe.get("lora_rank"))


def write_orbax(path: Path, bundle: Bundle) -> None:
    with replacing(path) as temporary:
        write_run_files(temporary, bundle.config, bundle.tokenizer_files, bundle.dtype, bundle.generation_config)
        with CheckpointStore(temporary / "checkpoints") as store:
            store.save(0, {"params": from_hf(bundle.tensors, bundle.config)}, {"origin": bundle.origin})
