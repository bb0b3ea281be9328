"""The training loop: batches, metrics, checkpoints, validation, and a clean stop on a signal.

The path of a batch: token file -> `batch(step)` -> `train_step` -> metrics. What is read, and what is learnt from it,
are a `BatchSource` and an `Objective`: `Batches` and `NextToken` in pre-training.
"""

import dataclasses
import functools
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from smollm_jax.data.batches import BatchSource
from smollm_jax.parallel import processes, sharding
from smollm_jax.parallel.processes import SyncedFlag
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runs.metrics import RunLog
from smollm_jax.runs.provenance import Provenance
from smollm_jax.runs.pytree import flatten
from smollm_jax.runtime.signals import StopSignal
from smollm_jax.training import optimizer
from smollm_jax.training.execution import ExecutionConfig, Intervals
from smollm_jax.training.loss import NEXT_TOKEN, Objective
from smollm_jax.training.state import Progress, TrainState, recorded_environment
from smollm_jax.training.train_step import Step, train_step
from smollm_jax.training.validation import validation_means


class Trainer:
    """Trains from `progress`, which it updates, to the recipe's last step.

    Checkpoints go to `store`, metrics to `log`. `step` is the result of `compile_step`; None: `train_step` compiles at
    its first call. `sample(model)` returns a line to print at each validation, or None. `frozen`
    is what the objective reads and does not train; `saved(model)` is called after each save.
    """

    def __init__(
        self,
        state: TrainState,
        progress: Progress,
        *,
        provenance: Provenance,
        batches: BatchSource,
        store: CheckpointStore,
        execution: ExecutionConfig,
        intervals: Intervals,
        stop: StopSignal,
        log: RunLog,
        step: Step | None = None,
        sample: Callable[[Any], str | None] | None = None,
        objective: Objective = NEXT_TOKEN,
        frozen: Any = None,
        saved: Callable[[Any], None] | None = None,
    ):
        self.state, self.progress = state, progress
        self.recipe, self.provenance, self.batches = provenance.recipe, provenance, batches
        self.store, self.execution, self.intervals = store, execution, intervals
        self.stop, self.log, self.sample = stop, log, sample
        self.schedule = optimizer.learning_rate(self.recipe)
        self.objective, self.frozen, self.saved = objective, frozen, saved
        if step is None:
            tx = optimizer.adamw(self.recipe)
            step = functools.partial(train_step, tx=tx, execution=execution, objective=objective)
        self.step = step if frozen is None else functools.partial(step, frozen=frozen)

    def run(self) -> TrainState:
        """The state after the last step. A run that starts from weights is validated at step 0, and one that is resumed
        at a step whose validation a signal prevented, at that step.

        Raises `StoppedError` after a signal, once a checkpoint is saved, and `DivergedError` if ten of the last 1,000
        updates were not finite. Such an update is skipped, does not advance the schedule, and its windows are logged.
        """
        recipe, progress, log = self.recipe, self.progress, self.log
        unvalidated = progress.step > 0 and self.is_validated(progress.step) and log.lacks_validation(progress.step)
        unvalidated = max(processes.all_gather_int(int(unvalidated)))  # one process has the file
        if progress.step >= recipe.steps and not unvalidated:
            log.note(f"already at step {progress.step} of {recipe.steps}: nothing to train; a larger --steps continues")
            return self.state
        log.start(progress.step, recipe.steps, recipe.tokens_per_step)
        if unvalidated or (progress.step == 0 and self.provenance.start_from and self.intervals.eval_every):
            self.validate()
            log.resume_clock()
        if progress.step >= recipe.steps:
            return self.state
        stopping, pending = SyncedFlag(), None
        batch, input_seconds = self.load_batch(progress.step)
        while progress.step < recipe.steps and not stopping(bool(self.stop)):
            self.state, metrics = self.step(self.state, batch)
            progress.step += 1
            progress.tokens_seen += recipe.tokens_per_step
            step, is_last = progress.step, progress.step == recipe.steps
            if pending is not None:
                self.log_step(*pending)
            pending = (step, metrics, input_seconds)
            if not is_last:
                batch, input_seconds = self.load_batch(step)  # while the device runs the step above
            saving = is_last or (self.intervals.save_every and step % self.intervals.save_every == 0)
            validating = self.is_validated(step)
            # On a CPU the call above blocks until the step is done: a late read hides nothing and blurs the throughput.
            if saving or validating or self.stop or jax.default_backend() == "cpu":
                self.log_step(*pending)
                pending = None
            if saving:
                self.save()
                log.note(f"saving step {step} in the background" if self.store.asynchronous else f"saved step {step}")
            if validating:
                self.validate()
            if saving or validating:
                log.resume_clock()
        if pending is not None:
            self.log_step(*pending)
        self.save_and_verify()
        return self.state

    def is_validated(self, step: int) -> bool:
        """Whether the loss on held-out batches is computed after a step."""
        every = self.intervals.eval_every
        return step == self.recipe.steps or (every > 0 and step % every == 0)

    def load_batch(self, step: int) -> tuple[Any, float]:
        """A step's batch on its devices, and the seconds to load it, which delay a device that is idle."""
        start, shapes = time.perf_counter(), self.batches.shapes
        batch = sharding.shard_batch(lambda rows: self.batches.batch(step, rows), shapes, self.execution.mesh)
        return batch, time.perf_counter() - start

    def log_step(self, step: int, metrics: dict[str, Any], input_seconds: float) -> None:
        """Waits for a step's metrics and logs them; raises `DivergedError` if too many updates were not finite."""
        values = {name: float(value) for name, value in metrics.items()}
        finite = all(map(np.isfinite, values.values()))
        rate = float(np.asarray(self.schedule(step - 1 - self.progress.skipped)))
        skipped = None if finite else self.batches.windows_of(step - 1)
        self.log.step(step, learning_rate=rate, skipped_windows=skipped, **values, input_seconds=input_seconds)
        if not finite:
            self.progress.skip(step)

    def save(self) -> None:
        """Saves a checkpoint of the current state."""
        meta = self.provenance.meta() | dataclasses.asdict(self.progress)
        meta |= {"fingerprints": self.provenance.fingerprints(), "environment": recorded_environment(self.execution)}
        meta |= {"cadence": dataclasses.asdict(self.intervals)}
        items = {"params": flatten(self.state.model), "optimizer": flatten(self.state.opt_state)}
        self.store.save(self.progress.step, items, meta)
        if self.saved is not None:
            self.saved(self.state.model)

    def validate(self) -> None:
        """Logs the loss on held-out batches and a sample; neither if a signal arrives meanwhile."""
        stop = None if jax.process_count() > 1 else self.stop
        means = validation_means(
            self.state.model,
            self.batches,
            self.intervals.eval_batches,
            self.execution,
            stop,
            objective=self.objective,
            frozen=self.frozen,
        )
        if means is None:
            return
        self.log.validation(self.progress.step, **means)
        if self.sample is not None and (text := self.sample(self.state.model)):
            self.log.note(f"step {self.progress.step}/{self.recipe.steps}  {text}")

    def save_and_verify(self) -> None:
        """Saves the current step unless it is saved, and verifies it; raises `StoppedError` after a signal."""
        step, steps = self.progress.step, self.recipe.steps
        self.store.wait()
        if step not in self.store.steps():
            self.save()
            self.store.wait()
        self.store.verify(step)
        if step < steps and not self.stop:
            self.stop.request(signal.SIGTERM)  # another process got the signal
        if self.stop:
            raise self.stop.error(f"step {step} of {steps} is saved and verified; --resume continues from it")
