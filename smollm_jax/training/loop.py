"""The loop around `train_step`: batches, metrics, checkpoints, validation, and the end that a signal asks for.

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
from smollm_jax.parallel.processes import SyncedFlag
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runs.metrics import RunLog
from smollm_jax.runs.provenance import Provenance
from smollm_jax.runs.pytree import flatten
from smollm_jax.runtime.signals import StopSignal
from smollm_jax.training import optimizer
from smollm_jax.training.execution import Cadence, Compute
from smollm_jax.training.state import Progress, TrainState, environment_of
from smollm_jax.training.train_step import Step, train_step
from smollm_jax.training.validation import validation_loss


class Trainer:
    """Takes a run from its progress to the recipe's last step.

    Checkpoints go to `store`, metrics to `log`; `progress` moves along. `step` is `train_step`, compiled by
    `compile_step`; without it, it is compiled when it is first called. `sample` gives a line that is printed at each
    validation, or None.
    """

    def __init__(
        self,
        state: TrainState,
        progress: Progress,
        *,
        provenance: Provenance,
        batches: Batches,
        store: CheckpointStore,
        compute: Compute,
        cadence: Cadence,
        stop: StopSignal,
        log: RunLog,
        step: Step | None = None,
        sample: Callable[[SmolLM], str | None] | None = None,
    ):
        self.state, self.progress = state, progress
        self.recipe, self.provenance, self.batches = provenance.recipe, provenance, batches
        self.store, self.compute, self.cadence = store, compute, cadence
        self.stop, self.log, self.sample = stop, log, sample
        self.schedule = optimizer.learning_rate(self.recipe)
        self.step = step or functools.partial(train_step, tx=optimizer.adamw(self.recipe), compute=compute)

    def run(self) -> TrainState:
        """The state after the last step. A run that starts from weights is validated at step 0.

        Raises `StoppedError` after a save when a signal asked for it, and `DivergedError` when ten of the last 1,000
        updates were not finite. Such an update is left out whole, with its step of the schedule, and its windows are
        logged.
        """
        recipe, progress, log = self.recipe, self.progress, self.log
        if progress.step >= recipe.steps:
            log.note(f"already at step {progress.step} of {recipe.steps}: nothing to train; --steps sets a higher end")
            return self.state
        log.start(progress.step, recipe.steps, recipe.tokens_per_step)
        if progress.step == 0 and self.provenance.start_from and self.cadence.eval_every:
            self.validate()
            log.resume_clock()
        stopping, pending = SyncedFlag(), None
        tokens, input_seconds = self.load_batch(progress.step)
        while progress.step < recipe.steps and not stopping(bool(self.stop)):
            self.state, metrics = self.step(self.state, tokens)
            progress.step += 1
            progress.tokens_seen += recipe.tokens_per_step
            done, last = progress.step, progress.step == recipe.steps
            if pending is not None:
                self.log_step(*pending)
            pending = (done, metrics, input_seconds)
            if not last:
                tokens, input_seconds = self.load_batch(done)  # while the device works on the step above
            saving = last or (self.cadence.save_every and done % self.cadence.save_every == 0)
            validating = last or (self.cadence.eval_every and done % self.cadence.eval_every == 0)
            # On a CPU a call returns when its step has ended: reading late gains nothing and blurs the throughput.
            if saving or validating or self.stop or jax.default_backend() == "cpu":
                self.log_step(*pending)
                pending = None
            if saving:
                self.save()
                log.note(f"saving step {done} in the background" if self.store.asynchronous else f"saved step {done}")
            if validating:
                self.validate()
            if saving or validating:
                log.resume_clock()
        if pending is not None:
            self.log_step(*pending)
        self.secure()
        return self.state

    def load_batch(self, step: int) -> tuple[Array, float]:
        """A step's batch on its devices, and the seconds that took: what the input costs a device that is not busy."""
        began, shape = time.perf_counter(), (self.recipe.batch_size, self.recipe.sequence_length + 1)
        tokens = sharding.shard_batch(lambda rows: self.batches.batch(step, rows), shape, self.compute.mesh)
        return tokens, time.perf_counter() - began

    def log_step(self, step: int, metrics: dict[str, Any], input_seconds: float) -> None:
        """Waits for a step's metrics and logs them; raises `DivergedError` when too many updates were not finite."""
        values = {name: float(value) for name, value in metrics.items()}
        finite = all(map(np.isfinite, values.values()))
        rate = float(np.asarray(self.schedule(step - 1 - self.progress.skipped)))
        skipped = None if finite else self.batches.windows_of(step - 1)
        self.log.step(step, learning_rate=rate, skipped_windows=skipped, **values, input_seconds=input_seconds)
        if not finite:
            self.progress.skip(step)

    def save(self) -> None:
        """Writes a checkpoint of the state as it is."""
        about = {"fingerprints": self.provenance.fingerprints(), "environment": environment_of(self.compute)}
        meta = self.provenance.meta() | dataclasses.asdict(self.progress) | about
        meta |= {"cadence": dataclasses.asdict(self.cadence)}
        items = {"params": flatten(self.state.model), "optimizer": flatten(self.state.opt_state)}
        self.store.save(self.progress.step, items, meta)

    def validate(self) -> None:
        """Logs the loss on held-out batches and a sample; neither when a signal comes in between."""
        stop = None if jax.process_count() > 1 else self.stop
        loss = validation_loss(self.state.model, self.batches, self.cadence.eval_batches, self.compute, stop)
        if loss is None:
            return
        self.log.validation(self.progress.step, loss)
        if self.sample is not None and (text := self.sample(self.state.model)):
            self.log.note(f"step {self.progress.step}/{self.recipe.steps}  {text}")

    def secure(self) -> None:
        """Saves the step the run has come to, if it is not, and verifies it; raises `StoppedError` after a signal."""
        step, steps = self.progress.step, self.recipe.steps
        self.store.wait()
        if step not in self.store.steps():
            self.save()
            self.store.wait()
        self.store.verify(step)
        if step < steps and not self.stop:
            self.stop.request(signal.SIGTERM)  # to another process, and so to the run
        if self.stop:
            raise self.stop.error(f"step {step} of {steps} is saved and verified; --resume goes on from it")
