"""Training: one jitted, donated step, and the loop around it.

A batch's way is one straight line: token file -> `batch(step)` -> `train_step` -> metrics.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from smollm_jax import optimizer
from smollm_jax.attention import Implementation, causal
from smollm_jax.checkpoint import CheckpointStore, flatten, unflatten
from smollm_jax.config import Config
from smollm_jax.data import Batches
from smollm_jax.errors import DivergedError, UsageError
from smollm_jax.loss import linear_cross_entropy
from smollm_jax.metrics import RunLog
from smollm_jax.model import SmolLM
from smollm_jax.recipe import Recipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step reads and replaces: float32 parameters and AdamW's moments (its step count among them)."""

    model: SmolLM
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the same numbers are computed; hashable, so that the jitted step takes it as a static argument."""

    dtype: str
    implementation: Implementation = "xla"
    remat: bool = False
    unroll: int = 1


def begin(model: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step: the model and moments of zero."""
    return TrainState(model, tx.init(model))


def mean_loss(model: SmolLM, tokens: Int[Array, "B window"], compute: Compute) -> Float[Array, ""]:
    """The mean over windows of T + 1 tokens of the next token's -log probability, in nats."""
    hidden, _ = model.hidden_states(
        tokens[:, :-1],
        dtype=compute.dtype,
        attend=causal(compute.implementation),
        remat=compute.remat,
        unroll=compute.unroll,
    )
    targets = tokens[:, 1:].reshape(-1)
    return linear_cross_entropy(hidden.reshape(targets.size, -1), model.head, targets) / targets.size


@functools.partial(jax.jit, static_argnames=("tx", "compute"), donate_argnames="state")
def train_step(
    state: TrainState, tokens: Int[Array, "B window"], *, tx: optax.GradientTransformation, compute: Compute
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """The state after one optimizer step, and its loss and gradient norm (before clipping) as device scalars."""
    loss, gradients = jax.value_and_grad(mean_loss)(state.model, tokens, compute)
    parameters: Any = state.model  # optax's types know arrays and dicts; a module is a pytree like them
    updates, opt_state = tx.update(gradients, state.opt_state, parameters)
    model: Any = optax.apply_updates(parameters, updates)
    return TrainState(model, opt_state), {"loss": loss, "gradient_norm": optax.global_norm(gradients)}


eval_step = jax.jit(mean_loss, static_argnames="compute")


def validation_loss(model: SmolLM, batches: Batches, count: int, compute: Compute) -> float:
    """The mean loss over up to `count` batches of held-out tokens."""
    losses = [(eval_step(model, jnp.asarray(tokens), compute), len(tokens)) for tokens in batches.validation(count)]
    return sum(float(loss) * rows for loss, rows in losses) / sum(rows for _, rows in losses)


@dataclasses.dataclass(frozen=True)
class Cadence:
    """How often a run stops to look around, in steps; 0 for never."""

    save_every: int
    eval_every: int
    eval_batches: int = 8


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run is trained on: where it was found, and the sha256 of its tokens, which may not change."""

    source: str
    sha256: str


def train(
    model: SmolLM,
    recipe: Recipe,
    batches: Batches,
    *,
    run: Path,
    compute: Compute,
    cadence: Cadence,
    data: Data,
    resume: bool,
    start_from: str = "",
    log: RunLog,
) -> SmolLM:
    """The trained model. Checkpoints go to `run/checkpoints`, metrics to `log`.

    `model` is where step 0 starts and, on `resume`, only the shape of what is restored. Raises `UsageError` when the
    run has checkpoints and `resume` is false, or when resumed under another recipe or on other data;
    `start_from` is noted in the checkpoints: the weights the run began with, empty for the recipe's init.
    `CheckpointError` when there is nothing to resume; `DivergedError` when the loss is not finite.
    """
    tx = optimizer.adamw(recipe)
    schedule = optimizer.learning_rate(recipe)
    state = begin(model, tx)
    with CheckpointStore(run / "checkpoints", keep=2) as store:
        if resume:
            start, state = restore(store, state, recipe, data)
            log.note(f"resumed from step {start}")
        elif store.steps():
            raise UsageError(
                f"{run}: holds a run up to step {store.latest_step()}: add --resume, or name another --out"
            )
        else:
            start = 0
        if start >= recipe.steps:
            log.note(f"already at step {start} of {recipe.steps}: nothing to train; --steps sets a higher end")
            return state.model
        log.start(start, recipe.steps, recipe.tokens_per_step)
        pending = None
        tokens = jax.device_put(batches.batch(start))
        for step in range(start, recipe.steps):
            state, metrics = train_step(state, tokens, tx=tx, compute=compute)
            done = step + 1
            if done < recipe.steps:
                tokens = jax.device_put(batches.batch(done))  # while the device works on the step above
            if pending is not None:
                record(log, schedule, *pending)
            pending = (done, metrics)
            saving = done == recipe.steps or (cadence.save_every and done % cadence.save_every == 0)
            evaluating = done == recipe.steps or (cadence.eval_every and done % cadence.eval_every == 0)
            # On a CPU a call returns when its step has ended: reading late gains nothing and blurs the throughput.
            if saving or evaluating or jax.default_backend() == "cpu":
                record(log, schedule, *pending)
                pending = None
            if saving:
                save(store, done, state, recipe, data, start_from)
                log.note(f"saved step {done} to {run / 'checkpoints'}")
            if evaluating:
                log.validation(done, validation_loss(state.model, batches, cadence.eval_batches, compute))
            if saving or evaluating:
                log.resume_clock()
    return state.model


def record(log: RunLog, schedule: optax.Schedule, step: int, metrics: dict[str, Any]) -> None:
    """Reads a finished step's metrics and logs them; raises `DivergedError` if one is not finite.

    The gradient's norm too: a loss is taken before its update, and a gradient that is not finite ruins the parameters.
    """
    values = {name: float(value) for name, value in metrics.items()}
    log.step(step, learning_rate=float(np.asarray(schedule(step - 1))), **values)
    for name, value in values.items():
        if not np.isfinite(value):
            what = name.replace("_", " ")
            raise DivergedError(f"step {step}: {what} is {value}; the checkpoints before it are intact")


def save(
    store: CheckpointStore, step: int, state: TrainState, recipe: Recipe, data: Data, start_from: str = ""
) -> None:
    """Writes the state after `step` steps: parameters, optimizer state, recipe and data position."""
    items = {"params": flatten(state.model), "optimizer": flatten(state.opt_state)}
    meta = {
        "step": step,
        "recipe": dataclasses.asdict(recipe),
        "data": data.source,
        "data_sha256": data.sha256,
        "start_from": start_from,
        "tokens_seen": step * recipe.tokens_per_step,
    }
    store.save(step, items, meta)


def restore(store: CheckpointStore, like: TrainState, recipe: Recipe, data: Data) -> tuple[int, TrainState]:
    """The newest step and its state; raises `UsageError` when recipe or data are not those it was saved with."""
    step = store.latest_step()
    meta = store.meta(step)
    changes = recipe.changes(meta["recipe"])
    if meta["data_sha256"] != data.sha256:
        changes.append(f"data: {meta['data']} ({meta['data_sha256'][:12]}) -> {data.source} ({data.sha256[:12]})")
    if changes:
        raise UsageError(f"{store.folder}: cannot resume step {step}, these changed: {'; '.join(changes)}")
    items = {"params": flatten(like.model), "optimizer": flatten(like.opt_state)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items)
    arrays = store.restore(step, abstract)
    model = unflatten(like.model, arrays["params"])
    return step, TrainState(model, unflatten(like.opt_state, arrays["optimizer"]))


def fresh(config: Config, seed: int) -> SmolLM:
    """A model with the recipe's init, drawn in one compiled program."""
    return jax.jit(SmolLM, static_argnums=0)(config, key=jax.random.key(seed))
