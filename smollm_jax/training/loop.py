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

from smollm_jax.data.batches import Batches
from smollm_jax.model.smollm import SmolLM
from smollm_jax.parallel import sharding
from smollm_jax.parallel.processes import AnyProcess
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runs.metrics import RunLog
from smollm_jax.runs.provenance import Provenance
from smollm_jax.runs.pytree import flatten
from smollm_jax.runtime.signals import Stop
from smollm_jax.training import optimizer
from smollm_jax.training.execution import Cadence, Compute
from smollm_jax.training.state import Progress, TrainState, environment_of
from smollm_jax.training.train_step import Step, train_step
from smollm_jax.training.validation import validation_loss

# Updates that were not finite end a run when 1 % of the last 1,000 were: so ten in a row do, too.


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
