"""Training: one jitted, donated step, and the loop around it.

A batch's way is one straight line: token file -> `batch(step)` -> `train_step` -> metrics.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

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
from smollm_jax.errors import CheckpointError, DivergedError, UsageError
from smollm_jax.loss import linear_cross_entropy
from smollm_jax.metrics import RunLog
from smollm_jax.model import Remat, SmolLM
from smollm_jax.provenance import Provenance, environment
from smollm_jax.recipe import Recipe
from smollm_jax.stop import Stop

# Updates that were not finite end a run when 1 % of the last 1,000 were: so ten in a row do, too.
SKIP_LIMIT, SKIP_WINDOW = 10, 1000


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
    remat: Remat = "dots"
    unroll: int = 1
    parts: int = 1  # of a batch, computed one after another

    def __post_init__(self) -> None:
        if self.unroll < 1:
            raise UsageError(f"unroll must be at least 1, got {self.unroll}")
        if self.remat not in get_args(Remat):
            raise UsageError(f"remat must be one of {', '.join(get_args(Remat))}, got {self.remat!r}")


Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]


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


def mean_gradients(model: SmolLM, tokens: Int[Array, "B window"], compute: Compute) -> tuple[Float[Array, ""], SmolLM]:
    """The mean loss and its gradients; of equal parts of the batch, one after another, added up in float32."""
    if compute.parts == 1:
        return jax.value_and_grad(mean_loss)(model, tokens, compute)
    parts = tokens.reshape(compute.parts, -1, tokens.shape[1])

    def add(total: Any, part: Int[Array, "b window"]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(mean_loss)(model, part, compute)), None

    shapes = jax.eval_shape(lambda: jax.value_and_grad(mean_loss)(model, parts[0], compute))
    total, _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), parts)
    return jax.tree.map(lambda x: x / compute.parts, total)  # every token counts, so a mean of means is the mean


@functools.partial(jax.jit, static_argnames=("tx", "compute"), donate_argnames="state")
def train_step(
    state: TrainState, tokens: Int[Array, "B window"], *, tx: optax.GradientTransformation, compute: Compute
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """The state after one optimizer step, and its loss and gradient norm (before clipping) as device scalars.

    When either is not finite the state comes back as it was, to the last bit, its step count too.
    """
    gradients: Any
    loss, gradients = mean_gradients(state.model, tokens, compute)
    with jax.named_scope("optimizer"):  # names for `scripts/profile_train.py`
        norm = optax.tree.norm(gradients)

    @jax.named_scope("optimizer")
    def update(state: TrainState) -> TrainState:
        parameters: Any = state.model  # optax's types know arrays and dicts; a module is a pytree like them
        updates, opt_state = tx.update(gradients, state.opt_state, parameters)
        model: Any = optax.apply_updates(parameters, updates)
        return TrainState(model, opt_state)

    # A branch costs a CPU nothing; choosing number by number costs 11 % of its step. (optax.apply_if_finite would
    # apply the NaN after its limit.)
    state = jax.lax.cond(jnp.isfinite(loss) & jnp.isfinite(norm), update, lambda state: state, state)
    return state, {"loss": loss, "gradient_norm": norm}


def compile_step(config: Config, recipe: Recipe, compute: Compute) -> Step:
    """A run's `train_step`, compiled from shapes alone: before there are data, beside whatever else a start must do."""
    tokens = jax.ShapeDtypeStruct((recipe.batch_size, recipe.sequence_length + 1), jnp.int32)
    state = abstract_state(config, recipe)
    return train_step.lower(state, tokens, tx=optimizer.adamw(recipe), compute=compute).compile()


eval_step = jax.jit(mean_loss, static_argnames="compute")


def validation_loss(
    model: SmolLM, batches: Batches, count: int, compute: Compute, stop: Stop | None = None
) -> float | None:
    """The mean loss over up to `count` batches of held-out tokens; None when a signal came in between."""
    losses = []
    for tokens in batches.validation(count):
        if stop:
            return None
        losses.append((eval_step(model, jnp.asarray(tokens), compute), len(tokens)))
    return sum(float(loss) * rows for loss, rows in losses) / sum(rows for _, rows in losses)


@dataclasses.dataclass(frozen=True)
class Cadence:
    """How often a run stops to look around, in steps; 0 for never."""

    save_every: int
    eval_every: int
    eval_batches: int = 8

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < (1 if name == "eval_batches" else 0):
                raise UsageError(f"{name} must be at least {1 if name == 'eval_batches' else 0}, got {value}")


@dataclasses.dataclass
class Progress:
    """How far a run is, and which updates it left out because they were not finite."""

    step: int = 0
    tokens_seen: int = 0
    skipped: int = 0
    recently_skipped: list[int] = dataclasses.field(default_factory=list)  # steps, of the last SKIP_WINDOW

    def skip(self, step: int) -> None:
        """Notes a skipped update; raises `DivergedError` when they are too many."""
        self.skipped += 1
        self.recently_skipped = [s for s in self.recently_skipped if s > step - SKIP_WINDOW] + [step]
        if len(self.recently_skipped) >= SKIP_LIMIT:
            raise DivergedError(
                f"step {step}: {len(self.recently_skipped)} of the last {SKIP_WINDOW:,} updates were not finite and "
                "left out; the checkpoints on disk are intact"
            )


@dataclasses.dataclass
class Saved:
    """What a checkpoint holds: all a run needs to go on."""

    provenance: Provenance
    progress: Progress
    cadence: Cadence
    environment: dict[str, Any]
    state: TrainState

    def state_under(self, config: Config) -> TrainState:
        """The state as a model of another config holds it; `UsageError` when its parameters have other shapes."""
        like = abstract_state(config, self.provenance.recipe)
        try:
            model = unflatten(like.model, flatten(self.state.model))
            return TrainState(model, unflatten(like.opt_state, flatten(self.state.opt_state)))
        except CheckpointError as error:
            raise UsageError(f"the saved parameters do not fit the changed model: {error}") from error


def train(
    state: TrainState,
    progress: Progress,
    *,
    provenance: Provenance,
    batches: Batches,
    store: CheckpointStore,
    compute: Compute,
    cadence: Cadence,
    stop: Stop,
    log: RunLog,
    step: Step | None = None,
) -> TrainState:
    """The state after the recipe's last step. Checkpoints go to `store`, metrics to `log`; `progress` moves along.

    `step` is `train_step`, compiled by `compile_step`; without it, it is compiled when it is first called.

    Raises `StoppedError` after a save when a signal asked for it, and `DivergedError` when ten of the last 1,000
    updates were not finite. Such an update is left out whole, with its step of the schedule, and its windows logged.
    """
    recipe = provenance.recipe
    tx, schedule = optimizer.adamw(recipe), optimizer.learning_rate(recipe)
    if progress.step >= recipe.steps:
        log.note(f"already at step {progress.step} of {recipe.steps}: nothing to train; --steps sets a higher end")
        return state

    def record(step: int, metrics: dict[str, Any]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        finite = all(map(np.isfinite, values.values()))
        rate = float(np.asarray(schedule(step - 1 - progress.skipped)))
        log.step(step, learning_rate=rate, skipped_windows=None if finite else batches.windows_of(step - 1), **values)
        if not finite:
            progress.skip(step)

    def save() -> None:
        about = {"fingerprints": provenance.fingerprints(), "environment": environment_of(compute)}
        meta = provenance.meta() | dataclasses.asdict(progress) | about | {"cadence": dataclasses.asdict(cadence)}
        store.save(progress.step, {"params": flatten(state.model), "optimizer": flatten(state.opt_state)}, meta)

    log.start(progress.step, recipe.steps, recipe.tokens_per_step)
    step = step or functools.partial(train_step, tx=tx, compute=compute)
    pending = None
    tokens = jax.device_put(batches.batch(progress.step))
    while progress.step < recipe.steps and not stop:
        state, metrics = step(state, tokens)
        progress.step += 1
        progress.tokens_seen += recipe.tokens_per_step
        done, last = progress.step, progress.step == recipe.steps
        if not last:
            tokens = jax.device_put(batches.batch(done))  # while the device works on the step above
        if pending is not None:
            record(*pending)
        pending = (done, metrics)
        saving = last or (cadence.save_every and done % cadence.save_every == 0)
        evaluating = last or (cadence.eval_every and done % cadence.eval_every == 0)
        # On a CPU a call returns when its step has ended: reading late gains nothing and blurs the throughput.
        if saving or evaluating or stop or jax.default_backend() == "cpu":
            record(*pending)
            pending = None
        if saving:
            save()
            log.note(f"saving step {done} in the background" if store.asynchronous else f"saved step {done}")
        if evaluating:
            loss = validation_loss(state.model, batches, cadence.eval_batches, compute, stop)
            if loss is not None:
                log.validation(done, loss)
        if saving or evaluating:
            log.resume_clock()
    if pending is not None:
        record(*pending)
    store.wait()
    if progress.step not in store.steps():
        save()
        store.wait()
    store.verify(progress.step)
    if stop:
        raise stop.error(f"step {progress.step} of {recipe.steps} is saved and verified; --resume goes on from it")
    return state


def load(store: CheckpointStore, step: int) -> Saved:
    """What a step holds, on this process's default device; raises `CheckpointError` when that is not a whole run."""
    meta = store.meta(step)
    try:
        provenance = Provenance.from_meta(meta)
        progress = Progress(**{field.name: meta[field.name] for field in dataclasses.fields(Progress)})
        cadence, environment = Cadence(**meta["cadence"]), meta["environment"]
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(f"{store.folder}: step {step}: {error}") from error
    like = abstract_state(provenance.config, provenance.recipe)
    items = {"params": flatten(like.model), "optimizer": flatten(like.opt_state)}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = store.restore(step, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), items))
    state = TrainState(unflatten(like.model, arrays["params"]), unflatten(like.opt_state, arrays["optimizer"]))
    return Saved(provenance, progress, cadence, environment, state)


def abstract_state(config: Config, recipe: Recipe) -> Any:
    """The shapes and dtypes of a run's state, in its structure."""
    tx = optimizer.adamw(recipe)
    return jax.eval_shape(lambda: begin(SmolLM(config, key=jax.random.key(0)), tx))


def environment_of(compute: Compute) -> dict[str, Any]:
    """What the last bit of a run's numbers depends on, apart from its provenance."""
    device = jax.devices()[0]
    return environment(device.device_kind, jax.device_count()) | dataclasses.asdict(compute)


def fresh(config: Config, seed: int) -> SmolLM:
    """A model with the recipe's init, drawn in one compiled program."""
    return jax.jit(SmolLM, static_argnums=0)(config, key=jax.random.key(seed))
