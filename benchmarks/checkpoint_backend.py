"""Times what a checkpoint's manifest adds to save and restore, and what the check for finite numbers adds to a step."""

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.workload import Prepared, Workload
from smollm_jax.runs import manifest
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runs.pytree import flatten
from smollm_jax.training import optimizer, train_step
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.loss import mean_gradients
from smollm_jax.training.state import TrainState, init_model, init_train_state


def prepare(_name: str, workload: Workload, folder: Path) -> Prepared:
    """The backend measures before it is ready: its `times` are lists of seconds by name, one per round."""
    seconds, states = steps(workload)
    state = states.pop("guarded")  # after some steps: an optimizer state of zeros would compress to nothing
    states.clear()
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:  # on the disk that the parent chose
        seconds |= saves(workload, state, Path(place))
    return dict, lambda: 0, {"device": jax.devices()[0].device_kind, "times": seconds}


def alternate(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round, in turn; the first round compiles and is discarded."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return {name: times[1:] for name, times in seconds.items()}


def steps(workload: Workload) -> tuple[dict[str, list[float]], dict[str, TrainState]]:
    """Seconds of steps with and without the check for finite numbers, and the state after them."""
    tokens, tx, execution = (
        jnp.asarray(workload.tokens()),
        optimizer.adamw(workload.recipe()),
        ExecutionConfig("float32"),
    )
    state = init_train_state(init_model(workload.config, 0), tx)

    @functools.partial(jax.jit, donate_argnums=0)
    def unguarded(state: TrainState) -> TrainState:
        gradients: Any
        _, gradients = mean_gradients(state.model, tokens, execution)
        model: Any = state.model
        updates, opt_state = tx.update(gradients, state.opt_state, model)
        return TrainState(optax.apply_updates(model, updates), opt_state)  # pyright: ignore[reportArgumentType]

    states = {"guarded": state, "unguarded": jax.tree.map(jnp.copy, state)}

    def step(name: str) -> None:
        if name == "guarded":
            states[name], _ = train_step.train_step(states[name], tokens, tx=tx, execution=execution)
        else:
            states[name] = unguarded(states[name])
        jax.block_until_ready(states[name])

    return alternate({name: functools.partial(step, name) for name in states}, workload.rounds), states


def saves(workload: Workload, state: TrainState, folder: Path) -> dict[str, list[float]]:
    """Seconds of saving, of the manifest in it, of verifying and of restoring."""
    items = {"params": flatten(state.model), "optimizer": flatten(state.opt_state)}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items)
    manifest_seconds, seal = [], manifest.seal

    def timed_seal(folder: Path, metadata: dict[str, Any]) -> None:
        began = time.perf_counter()
        seal(folder, metadata)
        manifest_seconds.append(time.perf_counter() - began)

    manifest.seal = timed_seal
    with CheckpointStore(folder / "checkpoints", keep=1) as store:
        functions = {
            "save": lambda: store.save(len(manifest_seconds) + 1, items, {}),
            "verify": lambda: store.verify(store.latest_step()),
            "restore": lambda: jax.block_until_ready(store.restore(store.latest_step(), like)),
        }
        seconds = alternate(functions, workload.rounds)
    manifest.seal = seal
    return seconds | {"manifest": manifest_seconds[1:]}
