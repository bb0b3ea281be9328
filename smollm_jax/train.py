"""Training: the loop around `train_step`, what it saves and what it goes on from.

A batch's way is one straight line: token file -> `batch(step)` -> `train_step` -> metrics.
"""

import dataclasses
import functools
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from smollm_jax import optimizer, sharding
from smollm_jax.checkpoint import CheckpointStore, flatten, unflatten
from smollm_jax.config import Config
from smollm_jax.data import Batches
from smollm_jax.distributed import AnyProcess
from smollm_jax.errors import CheckpointError, DivergedError, UsageError
from smollm_jax.metrics import RunLog
from smollm_jax.model import SmolLM
from smollm_jax.provenance import Provenance, environment
from smollm_jax.stop import Stop
from smollm_jax.train_step import Compute, Step, TrainState, abstract_state, eval_step, put_padded, train_step

# Updates that were not finite end a run when 1 % of the last 1,000 were: so ten in a row do, too.
SKIP_LIMIT, SKIP_WINDOW = 10, 1000


def validation_loss(
    model: SmolLM, batches: Batches, count: int, compute: Compute, stop: Stop | None = None
) -> float | None:
    """The mean loss over up to `count` batches of held-out tokens; None when a signal came in between."""
    losses = []
    for tokens in batches.validation(count):
        if stop:
            return None
        learnt = tokens[:, 1:].size if compute.document_end is None else (tokens[:, :-1] != compute.document_end).sum()
        losses.append((eval_step(model, put_padded(tokens, compute.mesh), compute), int(learnt)))
    return sum(float(loss) * learnt for loss, learnt in losses) / sum(learnt for _, learnt in losses)


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
    sample: Callable[[SmolLM], str | None] | None = None,
) -> TrainState:
    """The state after the recipe's last step. Checkpoints go to `store`, metrics to `log`; `progress` moves along.

    `step` is `train_step`, compiled by `compile_step`; without it, it is compiled when it is first called. `sample`
    gives a line that is printed at each validation, or None. A run that starts from weights is validated at step 0.

    Raises `StoppedError` after a save when a signal asked for it, and `DivergedError` when ten of the last 1,000
    updates were not finite. Such an update is left out whole, with its step of the schedule, and its windows logged.
    """
    recipe = provenance.recipe
    several = jax.process_count() > 1
    stopping = AnyProcess()
    tx, schedule = optimizer.adamw(recipe), optimizer.learning_rate(recipe)
    if progress.step >= recipe.steps:
        log.note(f"already at step {progress.step} of {recipe.steps}: nothing to train; --steps sets a higher end")
        return state

    def record(step: int, metrics: dict[str, Any], input_seconds: float) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        finite = all(map(np.isfinite, values.values()))
        rate = float(np.asarray(schedule(step - 1 - progress.skipped)))
        skipped = None if finite else batches.windows_of(step - 1)
        log.step(step, learning_rate=rate, skipped_windows=skipped, **values, input_seconds=input_seconds)
        if not finite:
            progress.skip(step)

    def save() -> None:
        about = {"fingerprints": provenance.fingerprints(), "environment": environment_of(compute)}
        meta = provenance.meta() | dataclasses.asdict(progress) | about | {"cadence": dataclasses.asdict(cadence)}
        store.save(progress.step, {"params": flatten(state.model), "optimizer": flatten(state.opt_state)}, meta)

    def read(step: int) -> tuple[Array, float]:
        """A step's batch on its devices, and the seconds that took: what the input costs a device that is not busy."""
        began, shape = time.perf_counter(), (recipe.batch_size, recipe.sequence_length + 1)
        tokens = sharding.put_rows(lambda rows: batches.batch(step, rows), shape, compute.mesh)
        return tokens, time.perf_counter() - began

    def validate() -> None:
        loss = validation_loss(state.model, batches, cadence.eval_batches, compute, None if several else stop)
        if loss is not None:
            log.validation(progress.step, loss)
        if loss is not None and sample is not None and (text := sample(state.model)):
            log.note(f"step {progress.step}/{recipe.steps}  {text}")

    log.start(progress.step, recipe.steps, recipe.tokens_per_step)
    if progress.step == 0 and provenance.start_from and cadence.eval_every:
        validate()
        log.resume_clock()
    step = step or functools.partial(train_step, tx=tx, compute=compute)
    pending = None
    tokens, input_seconds = read(progress.step)
    while progress.step < recipe.steps and not stopping(bool(stop)):
        state, metrics = step(state, tokens)
        progress.step += 1
        progress.tokens_seen += recipe.tokens_per_step
        done, last = progress.step, progress.step == recipe.steps
        if pending is not None:
            record(*pending)
        pending = (done, metrics, input_seconds)
        if not last:
            tokens, input_seconds = read(done)  # while the device works on the step above
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
            validate()
        if saving or evaluating:
            log.resume_clock()
    if pending is not None:
        record(*pending)
    store.wait()
    if progress.step not in store.steps():
        save()
        store.wait()
    store.verify(progress.step)
    if progress.step < recipe.steps and not stop:
        stop.signal = signal.SIGTERM  # to another process, and so to the run
    if stop:
        raise stop.error(f"step {progress.step} of {recipe.steps} is saved and verified; --resume goes on from it")
    return state


def load(store: CheckpointStore, step: int, mesh: jax.sharding.Mesh | None = None) -> Saved:
    """What a step holds, laid on a mesh or this process's first device, whatever layout saved it.

    Raises `CheckpointError` when that is not a whole run.
    """
    meta = store.meta(step)
    try:
        provenance = Provenance.from_meta(meta)
        progress = Progress(**{field.name: meta[field.name] for field in dataclasses.fields(Progress)})
        cadence, environment = Cadence(**meta["cadence"]), meta["environment"]
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(f"{store.folder}: step {step}: {error}") from error
    like = abstract_state(provenance.config, provenance.recipe)
    items = {"params": flatten(like.model), "optimizer": flatten(like.opt_state)}
    arrays = store.restore(step, sharding.abstract(items, mesh))
    state = TrainState(unflatten(like.model, arrays["params"]), unflatten(like.opt_state, arrays["optimizer"]))
    return Saved(provenance, progress, cadence, environment, state)


def environment_of(compute: Compute) -> dict[str, Any]:
    """What the last bit of a run's numbers depends on, apart from its provenance."""
    device = jax.devices()[0]
    fields = {field.name: getattr(compute, field.name) for field in dataclasses.fields(compute)}
    mesh = None if compute.mesh is None else dict(compute.mesh.shape)
    return environment(device.device_kind, jax.device_count()) | fields | {"mesh": mesh}
