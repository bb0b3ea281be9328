"""A training from its flags to its last checkpoint: `train_in` is the table of contents, each phase a function.

Work that the first step waits for is done side by side: the weights are read while JAX is imported, and the step is
compiled while weights and text are read.
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
from smollm_jax.training.announce import announce, print_differences
from smollm_jax.training.flags import TrainingFlags
from smollm_jax.training.loop import Trainer
from smollm_jax.training.sample import Sampler
from smollm_jax.training.setup import Setup, set_up
from smollm_jax.training.state import Progress, TrainState, environment_of, init_model, init_train_state
from smollm_jax.training.train_step import Step
from smollm_jax.training.validation import validation_loss
from smollm_jax.weights.bundle import Bundle


@dataclasses.dataclass(frozen=True)
class Data:
    """The batches of a run, what identifies their tokens, and how long these are."""

    batches: Batches
    provenance: Provenance
    bytes_per_token: float  # of the held-out tokens, in UTF-8


def train_in(
    run: Path,
    flags: TrainingFlags,
    stop: StopSignal,
    startup: QuickStart,
    *,
    read: Callable[[], Bundle] | None,
    retained: bool,
) -> None:
    """Trains in a run folder that is ours alone.

    `read` gives the weights to begin with, None where there are none. `retained`: glibc keeps freed memory.
    """
    compilation_cache.enable()
    setup = set_up(flags, run, read)
    sampler = Sampler.of(flags.prompt, setup.tokenizer, setup.start.config, stop)
    if setup.start.recipe.dtype == "float32":  # on a GPU JAX's default is TF32
        jax.config.update("jax_default_matmul_precision", "float32")
    device = jax.local_devices()[0]
    retained = retained and not give_back_memory(setup, device)
    step = compile_ahead(setup, device)
    announce(run, flags, setup, device, retained=retained)
    samples = flags.sample and jax.process_count() == 1
    if flags.sample and not samples:
        print("note: a run of several processes continues --prompt after the last step only")
    model = place_weights(setup)
    startup.end()
    data = open_data(flags, setup)
    progress, state = initial_state(run, flags, setup, data.provenance, model)
    write_configs(run, setup)
    state = fit(run, flags, setup, data, progress, state, stop, step, sampler.line if samples else None)
    if setup.reference is not None and not stop:
        show_reference(setup, data, stop)
    finish(run, flags, setup.start.recipe, sampler, processes.gather_to_local_device(state.model), stop)


def memory_is_tight(setup: Setup) -> bool:
    """Whether a step is planned to need more than half of a device's memory."""
    return setup.planned > setup.limit / 2


def give_back_memory(setup: Setup, device: Any) -> bool:
    """Has glibc give freed memory back again where keeping it could hurt: around what is kept a heap grows."""
    if not memory_is_tight(setup) and device.platform == "cpu":
        return False
    allocator.restore_defaults()
    return True


def compile_ahead(setup: Setup, device: Any) -> Step | None:
    """The train step, which is being compiled; None where the run has no step left to do."""
    start, recipe = setup.start, setup.start.recipe
    if start.saved and start.saved.progress.step >= recipe.steps:
        return None
    pool = ThreadPoolExecutor(1)
    compile_step = functools.partial(
        memory.compile_within, setup.limit, start.config, recipe, setup.compute, device.platform
    )
    compiling, step = compile_in(pool, device.platform, compile_step)
    pool.submit(importlib.import_module, "orbax.checkpoint")  # what `CheckpointStore` need not wait for then
    if memory_is_tight(setup):  # or it is refused after hours of reading, or finds no room for a parameter
        compiling.result()
    return step


def compile_in(pool: ThreadPoolExecutor, platform: str, compile_step: Callable[[], Step]) -> tuple[Future, Step]:
    """Compiles in `pool`: the future, to wait for, and the step, whose first call waits for it.

    Says on a GPU that it takes long, and at the first call, from the caller's thread, how long it took.
    """
    silent = platform == "cpu"  # where it takes seconds
    if not silent:
        print("compiling   the training step: one to two minutes the first time", flush=True)

    def timed() -> tuple[Step, float]:
        began = time.perf_counter()
        return compile_step(), time.perf_counter() - began

    def step(state: TrainState, tokens: Any) -> tuple[TrainState, dict[str, Any]]:
        nonlocal silent
        compiled, seconds = compiling.result()
        if not silent:
            print(f"compiled    the training step in {seconds:.1f} s", flush=True)
            silent = True
        return compiled(state, tokens)

    compiling = pool.submit(timed)
    return compiling, step


def place_weights(setup: Setup) -> SmolLM | None:
    """The model of the weights that the run begins with, on its devices; None where it begins with none.

    Before text is read, which may take hours: the weights' tensors may be views of a file.
    """
    bundle = setup.start.bundle
    if bundle is None:
        return None
    model = sharding.shard_params(weights.from_bundle(bundle), setup.compute.mesh)
    bundle.tensors.clear()
    return model


def open_data(flags: TrainingFlags, setup: Setup) -> Data:
    """The run's batches, prepared where its data is text.

    A first signal does not stop it: exit 75 promises a checkpoint.
    """
    start, tokenizer = setup.start, setup.tokenizer
    reading = {"on_bad_text": flags.on_bad_text, "special_tokens": flags.special_tokens}
    mixture = open_mixture(start.source, tokenizer.path, Path("data"), None, tokenizer, **reading)
    batches = Batches(mixture, start.recipe)
    held_out = np.concatenate([batch[:, 1:].ravel() for batch in batches.validation(setup.cadence.eval_batches)])
    bytes_per_token = tokenizer.byte_count(held_out.tolist()) / held_out.size
    source = shlex.join(start.source)
    print(f"data        {source}: {mixture.documents:,} documents, {mixture.tokens:,} tokens in {mixture.location}")
    hashes = mixture.sha256, mixture.tokenizer_sha256
    return Data(batches, Provenance(start.recipe, start.config, source, *hashes, start.start_from), bytes_per_token)


def initial_state(
    run: Path, flags: TrainingFlags, setup: Setup, provenance: Provenance, model: SmolLM | None
) -> tuple[Progress, TrainState]:
    """Where the run goes on, or its beginning with `model` (None: the recipe's init)."""
    start, recipe, compute = setup.start, setup.start.recipe, setup.compute
    if start.saved:
        for change in provenance.check_resumes(start.saved.provenance, flags.allow_change):
            print(f"note: changed, as --allow-change says: {change}")
        print_differences(start.saved, recipe, environment_of(compute))
        return start.saved.progress, start.saved.state_under(start.config)
    model = init_model(start.config, recipe.seed, compute.mesh) if model is None else model
    state = init_train_state(model, optimizer.adamw(recipe), compute.mesh)
    # Of a run that has no checkpoint, or has one no longer.
    if (run / "metrics.jsonl").exists() and processes.is_main_process():
        old = next(name for n in itertools.count(1) if not (name := run / f"metrics.jsonl.{n}").exists())
        (run / "metrics.jsonl").rename(old)
        print(f"note: starts from the beginning, in a run without a checkpoint; its metrics are now {old}")
    return Progress(), state


def write_configs(run: Path, setup: Setup) -> None:
    """The configs and the tokenizer's files, beside the checkpoints to come."""
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
    """The state after the last step; checkpoints and metrics are in the run folder."""
    recipe, compute, first = setup.start.recipe, setup.compute, processes.is_main_process()
    tracker = None
    if flags.track and first:
        tracker = Tracker(flags.track, run, data.provenance.meta() | {"environment": environment_of(compute)})
    peak = cost.peak_flops(jax.local_devices()[0].device_kind, recipe.dtype)
    store = CheckpointStore(run / "checkpoints", keep=flags.keep, asynchronous=flags.async_save)
    with (
        store,
        metrics.RunLog(
            run,
            log_every=flags.log_every,
            flops_per_token=cost.flops_per_token(setup.start.config, recipe.sequence_length),
            peak_flops=peak and peak * compute.devices,
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
            compute=compute,
            cadence=setup.cadence,
            stop=stop,
            log=log,
            step=step,
            sample=sample,
        ).run()


def show_reference(setup: Setup, data: Data, stop: StopSignal) -> None:
    """Prints what other weights reach on the same held-out text, unless a signal comes in between."""
    assert setup.reference is not None
    model = sharding.shard_params(weights.load(setup.reference)[0], setup.compute.mesh)
    loss = validation_loss(model, data.batches, setup.cadence.eval_batches, setup.compute, stop)
    if loss is not None:
        bits = metrics.bits_per_byte(loss, data.bytes_per_token)
        print(f"for scale: {setup.reference}, {bits:.3f} bits per byte")


def finish(run: Path, flags: TrainingFlags, recipe: Recipe, sampler: Sampler, model: SmolLM, stop: StopSignal) -> None:
    """Shows what the model writes and how to go on; raises `StoppedError` where a signal came after the last step."""
    if processes.is_main_process():
        sampler.show(model)
    if stop:
        raise stop.error(f"all {recipe.steps} steps are done, saved and verified")
    stop.ignore()
    print(f"\nnext: {as_typed('python scripts/generate.py')} --weights {run} --prompt {flags.prompt!r}")
