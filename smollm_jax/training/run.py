"""A training run from its flags to its last checkpoint: `run_training` calls one function for each phase.

The phases before the first step overlap: weights are read while JAX is imported, and the step is compiled while
weights and text are read.
"""

import dataclasses
import functools
import importlib
import itertools
import shlex
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from smollm_jax import weights
from smollm_jax.config import Recipe
from smollm_jax.data.batches import Batches
from smollm_jax.data.mixture import open_mixture
from smollm_jax.model import cost
from smollm_jax.model.smollm import SmolLM
from smollm_jax.parallel import processes, sharding
from smollm_jax.runs import metrics
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runs.folder import write_run_files
from smollm_jax.runs.provenance import Provenance
from smollm_jax.runs.tracking import Tracker
from smollm_jax.runtime import allocator, compilation_cache
from smollm_jax.runtime.invocation import as_typed
from smollm_jax.runtime.signals import StopSignal
from smollm_jax.runtime.startup import QuickStart
from smollm_jax.training import memory, optimizer
from smollm_jax.training.announce import announce, print_resume_differences
from smollm_jax.training.flags import TrainingFlags
from smollm_jax.training.loop import Trainer
from smollm_jax.training.sample import Sampler
from smollm_jax.training.setup import Setup, set_up
from smollm_jax.training.state import Progress, TrainState, init_model, init_train_state, recorded_environment
from smollm_jax.training.train_step import Step
from smollm_jax.training.validation import validation_means
from smollm_jax.weights.bundle import Bundle


@dataclasses.dataclass(frozen=True)
class Data:
    """A run's batches, and what identifies the data in a checkpoint."""

    batches: Batches
    provenance: Provenance
    bytes_per_token: float  # UTF-8 bytes per held-out token


def run_training(
    run: Path,
    flags: TrainingFlags,
    stop: StopSignal,
    startup: QuickStart,
    *,
    read_weights: Callable[[], Bundle] | None,
    retained: bool,
) -> None:
    """Trains in a run folder whose lock this run holds.

    `read_weights` reads the weights to start from; None: there are none. `retained`: glibc reuses freed memory.
    """
    compilation_cache.enable()
    setup = set_up(flags, run, read_weights)
    sampler = Sampler.for_prompt(flags.prompt, setup.tokenizer, setup.start.config, stop)
    if setup.start.recipe.dtype == "float32":  # JAX's default on a GPU is TF32
        jax.config.update("jax_default_matmul_precision", "float32")
    device = jax.local_devices()[0]
    retained = retained and not stop_retaining_memory(setup, device)
    step = start_compiling(setup, device)
    announce(run, flags, setup, device, retained=retained)
    sampling = flags.sample and jax.process_count() == 1
    if flags.sample and not sampling:
        print("note: with several processes --prompt is continued after the last step only")
    model = place_weights(setup)
    startup.end()
    data = open_data(flags, setup)
    progress, state = initial_state(run, flags, setup, data.provenance, model)
    write_configs(run, setup)
    state = fit(run, flags, setup, data, progress, state, stop, step, sampler.line if sampling else None)
    if setup.compare_with is not None and not stop:
        print_comparison(setup, data, stop)
    finish(run, flags, setup.start.recipe, sampler, processes.gather_to_local_device(state.model), stop)


def memory_is_tight(setup: Setup) -> bool:
    """Whether a step is estimated to need more than half of a device's memory."""
    return setup.planned > setup.limit / 2


def stop_retaining_memory(setup: Setup, device: Any) -> bool:
    """Undoes `allocator.retain_freed_memory` if memory is tight or the device is a GPU; returns whether it did.

    Retained memory fragments the heap, which grows around it.
    """
    if not memory_is_tight(setup) and device.platform == "cpu":
        return False
    allocator.restore_defaults()
    return True


def start_compiling(setup: Setup, device: Any) -> Step | None:
    """The train step, compiling in the background; None if the run has no step left."""
    start, recipe = setup.start, setup.start.recipe
    if start.restored and start.restored.progress.step >= recipe.steps:
        return None
    pool = ThreadPoolExecutor(1)
    compile_step = functools.partial(
        memory.compile_within, setup.limit, start.config, recipe, setup.execution, device.platform
    )
    compiling, step = compile_in_background(pool, device.platform, compile_step)
    pool.submit(importlib.import_module, "orbax.checkpoint")  # so that `CheckpointStore` need not wait for the import
    # If the step will not fit, fail now, not after hours of preparing text or halfway through placing parameters.
    if memory_is_tight(setup):
        compiling.result()
    return step


def compile_in_background(
    pool: ThreadPoolExecutor, platform: str, compile_step: Callable[[], Step]
) -> tuple[Future, Step]:
    """Compiles in `pool`: returns the future, and the step, whose first call waits for it.

    On a GPU, prints at the start that it takes minutes, and at the first call, from its thread, how long it took.
    """
    silent = platform == "cpu"  # compiles in seconds
    if not silent:
        print("compiling   the training step: one to two minutes the first time", flush=True)

    def timed() -> tuple[Step, float]:
        start = time.perf_counter()
        return compile_step(), time.perf_counter() - start

    def step(state: TrainState, batch: Any, **frozen: Any) -> tuple[TrainState, dict[str, Any]]:
        nonlocal silent
        compiled, seconds = compiling.result()
        if not silent:
            print(f"compiled    the training step in {seconds:.1f} s", flush=True)
            silent = True
        return compiled(state, batch, **frozen)

    compiling = pool.submit(timed)
    return compiling, step


def place_weights(setup: Setup) -> SmolLM | None:
    """The model of the weights that the run starts from, on its devices; None if it starts from random ones.

    Called before text is prepared, which may take hours: the tensors may be memory-mapped views of a file.
    """
    bundle = setup.start.bundle
    if bundle is None:
        return None
    model = sharding.shard_params(weights.from_bundle(bundle), setup.execution.mesh)
    bundle.tensors.clear()
    return model


def open_data(flags: TrainingFlags, setup: Setup) -> Data:
    """Opens the run's data, and prepares it first if it is text.

    A first signal does not interrupt the preparation, because exit code 75 promises a checkpoint.
    """
    start, tokenizer = setup.start, setup.tokenizer
    options = {"on_bad_text": flags.on_bad_text, "special_tokens": flags.special_tokens}
    mixture = open_mixture(start.source, tokenizer.path, Path("data"), None, tokenizer, **options)
    batches = Batches(mixture, start.recipe)
    held_out = np.concatenate([batch[:, 1:].ravel() for batch in batches.validation(setup.intervals.eval_batches)])
    bytes_per_token = tokenizer.byte_count(held_out.tolist()) / held_out.size
    source = shlex.join(start.source)
    print(f"data        {source}: {mixture.documents:,} documents, {mixture.tokens:,} tokens in {mixture.location}")
    provenance = Provenance(
        start.recipe, start.config, source, mixture.sha256, mixture.tokenizer_sha256, start.start_from
    )
    return Data(batches, provenance, bytes_per_token)


def initial_state(
    run: Path, flags: TrainingFlags, setup: Setup, provenance: Provenance, model: SmolLM | None
) -> tuple[Progress, TrainState]:
    """Progress and state of the resumed checkpoint, or of a new run with `model` (None: random parameters)."""
    start, recipe, execution = setup.start, setup.start.recipe, setup.execution
    if start.restored:
        for change in provenance.check_resumes(start.restored.provenance, flags.allow_change):
            print(f"note: changed, allowed by --allow-change: {change}")
        print_resume_differences(start.restored, recipe, recorded_environment(execution))
        return start.restored.progress, start.restored.with_config(start.config)
    model = init_model(start.config, recipe.seed, execution.mesh) if model is None else model
    state = init_train_state(model, optimizer.adamw(recipe), execution.mesh)
    # Metrics of a run that died before its first checkpoint, or whose checkpoints were removed.
    if (run / "metrics.jsonl").exists() and processes.is_main_process():
        renamed = next(path for n in itertools.count(1) if not (path := run / f"metrics.jsonl.{n}").exists())
        (run / "metrics.jsonl").rename(renamed)
        print(f"note: this run has no checkpoint and starts at step 0; its earlier metrics are now {renamed}")
    return Progress(), state


def write_configs(run: Path, setup: Setup) -> None:
    """Writes the config files and the tokenizer into the run folder."""
    if not processes.is_main_process():
        return
    bundle = setup.start.bundle
    generation_config = bundle.generation_config if bundle else None
    write_run_files(run, setup.start.config, setup.tokenizer.files, generation_config=generation_config)


def fit(
    run: Path,
    flags: TrainingFlags,
    setup: Setup,
    data: Data,
    progress: Progress,
    state: TrainState,
    stop: StopSignal,
    step: Step | None,
    sample: Callable[[SmolLM], str | None] | None,
) -> TrainState:
    """Trains to the last step and returns the state; checkpoints and metrics are in the run folder."""
    recipe, execution, first = setup.start.recipe, setup.execution, processes.is_main_process()
    tracker = None
    if flags.track and first:
        tracker = Tracker(flags.track, run, data.provenance.meta() | {"environment": recorded_environment(execution)})
    peak_flops = cost.peak_flops(jax.local_devices()[0].device_kind, recipe.dtype)
    store = CheckpointStore(run / "checkpoints", keep=flags.keep_checkpoints, asynchronous=flags.async_save)
    with (
        store,
        metrics.RunLog(
            run,
            log_every=flags.log_every,
            flops_per_token=cost.flops_per_token(setup.start.config, recipe.sequence_length),
            peak_flops=peak_flops and peak_flops * execution.devices,
            bytes_per_token=data.bytes_per_token,
            tensorboard=flags.tensorboard and first,
            tracker=tracker,
            write_file=first,
        ) as log,
    ):
        return Trainer(
            state,
            progress,
            provenance=data.provenance,
            batches=data.batches,
            store=store,
            execution=execution,
            intervals=setup.intervals,
            stop=stop,
            log=log,
            step=step,
            sample=sample,
        ).run()


def print_comparison(setup: Setup, data: Data, stop: StopSignal) -> None:
    """Prints the loss of the --compare-with weights on the same text; nothing if a signal arrives meanwhile."""
    assert setup.compare_with is not None
    model = sharding.shard_params(weights.load(setup.compare_with)[0], setup.execution.mesh)
    means = validation_means(model, data.batches, setup.intervals.eval_batches, setup.execution, stop)
    if means is not None:
        bits = metrics.bits_per_byte(means["loss"], data.bytes_per_token)
        print(f"for comparison: {setup.compare_with}, {bits:.3f} bits per byte")


def finish(run: Path, flags: TrainingFlags, recipe: Recipe, sampler: Sampler, model: SmolLM, stop: StopSignal) -> None:
    """Prints a sample and the next command; raises `StoppedError` if a signal came after the last step."""
    if processes.is_main_process():
        sampler.print_final(model)
    if stop:
        raise stop.error(f"all {recipe.steps} steps are done, saved and verified")
    stop.ignore()
    print(f"\nnext: {as_typed('python scripts/generate.py')} --weights {run} --prompt {flags.prompt!r}")
