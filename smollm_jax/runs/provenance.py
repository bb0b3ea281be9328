"""What a checkpoint says of its run, and what a resumed run has to agree with. Framework-free."""

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from smollm_jax.config import Config, Recipe
from smollm_jax.errors import CheckpointError, UsageError

# May change when a run is resumed: how far it goes. (A new end moves the schedule's decay with it.)
FREE_ON_RESUME = ("steps",)


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Everything that decides a run's numbers, and where they began."""

    recipe: Recipe
    config: Config
    data: str  # where it was found; its sha256 is what counts
    data_sha256: str
    tokenizer_sha256: str
    start_from: str = ""  # the weights the run began with; empty for the recipe's init

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> "Provenance":
        """What `meta` of a saved step says; raises `CheckpointError` when it says less than a trainer needs."""
        if "recipe" not in meta:
            raise CheckpointError("it holds weights only: start from them with --init-from")
        try:
            rest = {field.name: meta[field.name] for field in dataclasses.fields(cls)[2:]}
            return cls(Recipe(**meta["recipe"]), Config(**meta["config"]), **rest)
        except (KeyError, TypeError, UsageError) as error:
            raise CheckpointError(f"it was saved by another version of this trainer: {error}") from error

    def meta(self) -> dict[str, Any]:
        """The JSON that `from_meta` reads."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def fingerprints(self) -> dict[str, str]:
        """A sha256 each of config, data and tokenizer."""
        config = json.dumps(self.meta()["config"], sort_keys=True).encode()
        return {
            "config": hashlib.sha256(config).hexdigest(),
            "data": self.data_sha256,
            "tokenizer": self.tokenizer_sha256,
        }

    def check_resumes(self, saved: "Provenance", allowed: Sequence[str]) -> list[str]:
        """The changes since `saved` that `allowed` names, "name: old -> new" each; `UsageError` names all others."""
        then, now = saved._identity(), self._identity()
        if unknown := sorted(set(allowed) - now.keys()):
            raise UsageError(f"--allow-change {' '.join(unknown)}: unknown, known are {', '.join(sorted(now))}")
        changes = {name: f"{name}: {then[name]!r} -> {now[name]!r}" for name in now if then[name] != now[name]}
        if "data" in changes:
            changes["data"] = f"data: {saved.data} ({then['data'][:12]}) -> {self.data} ({now['data'][:12]})"
        if refused := [change for name, change in changes.items() if name not in allowed]:
            raise UsageError(f"cannot resume, these changed: {'; '.join(refused)} (--allow-change NAME takes a change)")
        return list(changes.values())

    def _identity(self) -> dict[str, Any]:
        meta = self.meta()
        flat = meta["recipe"] | meta["config"]
        flat |= {"data": self.data_sha256, "tokenizer": self.tokenizer_sha256}
        return {name: value for name, value in flat.items() if name not in FREE_ON_RESUME}


def environment(device: str, devices: int) -> dict[str, Any]:
    """What else the last bit of a number depends on: versions, devices and cores."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    cores = {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0))}
    return {name: version(name) for name in packages} | cores | {"device": device, "devices": devices}
