"""The provenance that a checkpoint records, and what must not change when a run is resumed. Framework-free."""

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from smollm_jax.config import Config, Recipe
from smollm_jax.config.finetune_recipe import FinetuneRecipe
from smollm_jax.errors import CheckpointError, UsageError, short_repr

# May change on resume. (The learning rate schedule's decay moves with the last step.)
FREE_ON_RESUME = ("steps",)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Everything that determines the results of a run, and the weights it started from."""

    recipe: Recipe
    config: Config
    data: str  # its path, for messages; data_sha256 identifies it
    data_sha256: str
    tokenizer_sha256: str
    start_from: str = ""  # the weights the run started from; empty for random initialisation

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> "Provenance":
        """The provenance in `meta` of a saved step; raises `CheckpointError` if a field is missing or unknown."""
        if "recipe" not in meta:
            raise CheckpointError("it has weights but no training state: start from them with --init-from")
        try:
            values = {field.name: meta[field.name] for field in dataclasses.fields(cls)}
        except KeyError as error:
            raise CheckpointError(f"it was saved by another version of this trainer: {error}") from error
        recipe = values["recipe"]
        kind = FinetuneRecipe if isinstance(recipe, dict) and "method" in recipe else Recipe
        return from_json(cls, values | {"recipe": from_json(kind, recipe), "config": from_json(Config, meta["config"])})

    def meta(self) -> dict[str, Any]:
        """The JSON that `from_meta` reads."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def fingerprints(self) -> dict[str, str]:
        """The sha256 of the config, of the data and of the tokenizer."""
        config = json.dumps(self.meta()["config"], sort_keys=True).encode()
        return {
            "config": hashlib.sha256(config).hexdigest(),
            "data": self.data_sha256,
            "tokenizer": self.tokenizer_sha256,
        }

    def check_resumes(self, saved: "Provenance", allowed: Sequence[str]) -> list[str]:
        """The changes of `allowed` fields since `saved`, each "name: old -> new"; `UsageError` lists other changes."""
        old, new = saved._identity(), self._identity()
        if unknown := sorted(set(allowed) - new.keys()):
            raise UsageError(f"--allow-change {' '.join(unknown)}: no such field; choose from {', '.join(sorted(new))}")
        changes = {name: f"{name}: {old[name]!r} -> {new[name]!r}" for name in new if old[name] != new[name]}
        if "data" in changes:
            changes["data"] = f"data: {saved.data} ({old['data'][:12]}) -> {self.data} ({new['data'][:12]})"
        if refused := [change for name, change in changes.items() if name not in allowed]:
            raise UsageError(f"cannot resume, these changed: {'; '.join(refused)} (--allow-change NAME accepts one)")
        return list(changes.values())

    def _identity(self) -> dict[str, Any]:
        meta = self.meta()
        flat = meta["recipe"] | meta["config"]
        flat |= {"data": self.data_sha256, "tokenizer": self.tokenizer_sha256}
        return {name: value for name, value in flat.items() if name not in FREE_ON_RESUME}


def from_json(kind: type[T], values: Any) -> T:
    """A dataclass from the JSON object that a checkpoint has for it.

    Raises `CheckpointError` if a field is missing, unknown, of another type or refused by the dataclass.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"its {kind.__name__} is {short_repr(values)}, not an object")
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name in hints and not _has_type(value, hints[name]):
            raise CheckpointError(f"its {kind.__name__} has {name} {short_repr(value)}")
    try:
        return kind(**values)
    except (TypeError, UsageError) as error:
        raise CheckpointError(f"it was saved by another version of this trainer: {error}") from error


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a value of JSON has the type of a field; a tuple is a list there."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, UnionType):
        return any(_has_type(value, option) for option in get_args(hint))
    if get_origin(hint) in (list, tuple):
        return isinstance(value, list) and all(_has_type(item, get_args(hint)[0]) for item in value)
    return isinstance(value, (int, float) if hint is float else hint) and (hint is bool or type(value) is not bool)


def environment(device: str, devices: int) -> dict[str, Any]:
    """What else can change the last bits of a result: package versions, devices and CPU cores."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    cores = {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0))}
    return {name: version(name) for name in packages} | cores | {"device": device, "devices": devices}
