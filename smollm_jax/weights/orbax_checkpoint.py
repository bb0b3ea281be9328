"""A run folder with Orbax checkpoints as weights, read and written."""

from pathlib import Path
from typing import TYPE_CHECKING

import einops

from smollm_jax.config import Config
from smollm_jax.config.generation_config import read_generation_config
from smollm_jax.config.hf_config import read_config
from smollm_jax.errors import InputFileError
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runs.folder import write_run_files
from smollm_jax.runtime.atomic import replacing
from smollm_jax.tokenizer.source import read_tokenizer_files, run_folder
from smollm_jax.weights.bundle import Bundle
from smollm_jax.weights.mapping import rules, to_hf, to_ours

if TYPE_CHECKING:
    pass


def read_orbax(path: Path, allow_unverified: bool) -> Bundle:
    above = run_folder(path)
    step, run = (None, path) if above is None else (int(path.name), above)
    config = read_config(run / "config.json")
    with CheckpointStore(run / "checkpoints", create=False) as store:
        step = store.latest_step() if step is None else step
        store.verify(step, item="params", allow_unverified=allow_unverified)
        meta = store.meta(step)
        parameters = store.read(step, "params")
    trained = Config(**meta["config"]) if "config" in meta else config
    if trained != config:
        fields = [name for name in vars(config) if getattr(config, name) != getattr(trained, name)]
        changes = [f"{name}: {getattr(trained, name)!r} -> {getattr(config, name)!r}" for name in fields]
        raise InputFileError(f"{run / 'config.json'}: is not what step {step} was saved with: {'; '.join(changes)}")
    origin = meta.get("origin") or f"step {step} of run {run.name}"
    expected = {name for name, _ in rules(config).values()}
    if set(parameters) != expected:
        differing = sorted(set(parameters) ^ expected)
        raise InputFileError(f"{path}: step {step} does not hold this config's parameters: {', '.join(differing)}")
    try:
        tensors = to_hf(parameters, config)
    except einops.EinopsError as error:
        raise InputFileError(f"{path}: step {step} has a parameter of the wrong shape: {error}") from error
    return Bundle(tensors, config, read_tokenizer_files(run), origin, read_generation_config(run))


def write_orbax(path: Path, bundle: Bundle) -> None:
    with replacing(path) as temporary:
        write_run_files(temporary, bundle.config, bundle.tokenizer_files, bundle.dtype, bundle.generation_config)
        with CheckpointStore(temporary / "checkpoints") as store:
            store.save(0, {"params": to_ours(bundle.tensors, bundle.config)}, {"origin": bundle.origin})
