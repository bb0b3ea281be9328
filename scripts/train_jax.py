"""Train SmolLM2 on text.

    python scripts/train_jax.py                                  # everything chosen for this machine
    python scripts/train_jax.py --resume                         # go on with the newest run
    python scripts/train_jax.py --data my_text/ --init-from assets/SmolLM2-135M-Instruct # goes on training weights
    python scripts/train_jax.py --mesh data=8 --batch-size 64    # on eight GPUs; docs/scaling.md for several machines
    python scripts/train_jax.py --recipe one-gpu-day --data DATA # a whole run by name

On a GPU: 5,000 steps of 8 x 2,048 tokens in bfloat16. Without one: the same 134.5M parameters at a demo size that
takes about 10 minutes on 2 cores. A flag left out is chosen by the device and printed before training starts.
"""

import concurrent.futures
import contextlib
import functools
import gc
import importlib
import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.data.mixture import open_mixture
from smollm_jax.runs.folder import write_run_files
from smollm_jax.runtime.program import run_main
from smollm_jax.training.flags import TrainingFlags


def main(argv: list[str] | None = None) -> None:
    # Until text is read (docs/performance.md, "What helped"): nearly all that a start makes stays, and its threads do
    # most of their work without Python's lock, which they would wait 5 ms for each time.
    gc.disable()
    sys.setswitchinterval(1e-4)
    flags = command_line.parse(TrainingFlags, argv, __doc__, weights=("init_from", "reference"))
    from smollm_jax.runtime.signals import Stop

    stop = Stop().listen()
    for name in ("log_every", "keep"):
        if getattr(flags, name) < 1:
            raise errors.UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(flags, name)}")
    by_hand = [
        name for name in ("coordinator_address", "num_processes", "process_id") if getattr(flags, name) is not None
    ]
    if flags.distributed:
        if not flags.out or flags.async_save:
            raise errors.UsageError("--distributed needs --out, a folder all processes see, and takes no --async-save")
        from smollm_jax.parallel import processes

        processes.connect(flags.coordinator_address, flags.num_processes, flags.process_id)
        if not processes.first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # the first process speaks for all
        with processes.one_for_all():
            begin(flags, stop, first=processes.first())
    elif by_hand:
        raise errors.UsageError(f"--{by_hand[0].replace('_', '-')} says something about --distributed only")
    else:
        begin(flags, stop, first=True)


def begin(flags: TrainingFlags, stop, *, first: bool) -> None:
    """Trains in the run folder the flags mean, which the first of a run's processes holds a lock on."""
    from smollm_jax.config import named_runs
    from smollm_jax.runs.folder import emptied_unless_trained, newest_run, refuse_used
    from smollm_jax.runtime.lock import RunLock
    from smollm_jax.training import inputs

    inputs.check(flags)
    if flags.resume:
        run = flags.out or newest_run()
        if not (run / "checkpoints").is_dir():
            raise errors.CheckpointError(f"--resume: {run / 'checkpoints'}: no such checkpoint folder")
    else:
        if flags.allow_change or flags.allow_unverified:
            raise errors.UsageError("--allow-change and --allow-unverified say something about --resume only")
        name = flags.preset or named_runs.named(flags.recipe or "demo").preset
        run = flags.out or Path(f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{name}")
        refuse_used(run)
        # What a run left that died before its first checkpoint is replaced; it has a lock file from its start on.
        if any(run.glob("*")) and not (run / "lock").exists():
            raise errors.UsageError(f"{run}: exists and is no run of this trainer: name another --out")
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(RunLock(run))
            stack.enter_context(emptied_unless_trained(run))
        if not flags.resume:
            refuse_used(run)  # another trainer may have had it in between
        train_in(run, flags, stop)


def train_in(run: Path, flags: TrainingFlags, stop) -> None:
    """Trains in a run folder that is ours alone."""
    from smollm_jax import weights
    from smollm_jax.runtime import allocator

    kept, read = allocator.keep(), None
    if flags.init_from and not flags.resume:
        read = functools.partial(weights.read, flags.init_from, mapped=True)
        # While JAX is imported, for most of it is hashing, without Python's lock. The other kinds' readers import JAX
        # or PyTorch themselves, or silence stderr.
        if weights.kind_of(flags.init_from) in ("hf", "safetensors"):
            read = concurrent.futures.ThreadPoolExecutor(1).submit(read).result
    import jax
    import numpy as np

    from smollm_jax.data import batches as data
    from smollm_jax.model import cost
    from smollm_jax.parallel import processes, sharding
    from smollm_jax.runs import metrics
    from smollm_jax.runs.checkpoint import CheckpointStore
    from smollm_jax.runs.provenance import Provenance
    from smollm_jax.runs.tracking import Tracker
    from smollm_jax.runtime import compilation_cache
    from smollm_jax.training import loop, memory, optimizer
    from smollm_jax.training.sample import Sampler
    from smollm_jax.training.setup import set_up
    from smollm_jax.training.state import Progress, environment_of, init_model, init_train_state
    from smollm_jax.training.validation import validation_loss

    compilation_cache.enable()
    setup = set_up(flags, run, read)
    start, recipe, compute, cadence = setup.start, setup.start.recipe, setup.compute, setup.cadence
    config, saved, bundle, mesh = start.config, start.saved, start.bundle, compute.mesh
    tokenizer, step = setup.tokenizer, None
    sampler = Sampler.of(flags.prompt, tokenizer, config, stop)
    if recipe.dtype == "float32":  # on a GPU JAX's default is TF32
        jax.config.update("jax_default_matmul_precision", "float32")
    device = jax.local_devices()[0]
    tight = setup.planned > setup.limit / 2
    if kept and (tight or device.platform != "cpu"):  # around what is kept a heap grows
        allocator.give_back()
        kept = False
    if not saved or saved.progress.step < recipe.steps:  # compiles while weights and tokens are read
        arguments = setup.limit, config, recipe, compute, device.platform
        beside = concurrent.futures.ThreadPoolExecutor(1)
        compiling, step = compile_in(beside, device.platform, functools.partial(memory.compile_within, *arguments))
        beside.submit(importlib.import_module, "orbax.checkpoint")  # what `CheckpointStore` need not wait for then
        if tight:  # or it is refused after hours of reading, or finds no room for a parameter
            compiling.result()
    announce(run, flags, setup, device, kept)
    samples = flags.sample and jax.process_count() == 1
    if flags.sample and not samples:
        print("note: a run of several processes continues --prompt after the last step only")

    model = None
    if bundle:  # before text is read, which may take hours: its tensors may be views of a file
        model = sharding.put(weights.from_bundle(bundle), mesh)
        bundle.tensors.clear()
    gc.freeze()
    gc.enable()
    sys.setswitchinterval(5e-3)
    # Not stopped by a first signal: exit 75 promises a checkpoint.
    reading = {"on_bad_text": flags.on_bad_text, "special_tokens": flags.special_tokens}
    tokens = open_mixture(start.source, tokenizer.path, Path("data"), None, tokenizer, **reading)
    batches = data.Batches(tokens, recipe)
    held_out = np.concatenate([batch[:, 1:].ravel() for batch in batches.validation(cadence.eval_batches)])
    bytes_per_token = tokenizer.byte_count(held_out.tolist()) / held_out.size
    named = shlex.join(start.source)
    print(f"data        {named}: {tokens.documents:,} documents, {tokens.tokens:,} tokens in {tokens.places}")
    provenance = Provenance(recipe, config, named, tokens.sha256, tokens.tokenizer_sha256, start.start_from)
    if saved:
        for change in provenance.check_resumes(saved.provenance, flags.allow_change):
            print(f"note: changed, as --allow-change says: {change}")
        print_differences(saved, recipe, environment_of(compute))
        progress, state = saved.progress, saved.state_under(config)
    else:
        progress = Progress()
        model = init_model(config, recipe.seed, mesh) if model is None else model
        state = init_train_state(model, optimizer.adamw(recipe), mesh)
        # Of a run that has no checkpoint, or has one no longer.
        if (run / "metrics.jsonl").exists() and processes.first():
            old = next(name for n in itertools.count(1) if not (name := run / f"metrics.jsonl.{n}").exists())
            (run / "metrics.jsonl").rename(old)
            print(f"note: starts from the beginning, in a run without a checkpoint; its metrics are now {old}")
    if processes.first():
        generation_config = start.bundle.generation_config if start.bundle else None
        write_run_files(run, config, tokenizer.files, generation_config=generation_config)
    tracker = None
    if flags.track and processes.first():
        tracker = Tracker(flags.track, run, provenance.meta() | {"environment": environment_of(compute)})
    flops = cost.flops_per_token(config, recipe.sequence_length)
    peak = cost.peak_flops(device.device_kind, recipe.dtype)
    peak = peak and peak * compute.devices
    with (
        CheckpointStore(run / "checkpoints", keep=flags.keep, asynchronous=flags.async_save) as store,
        metrics.RunLog(
            run,
            log_every=flags.log_every,
            flops_per_token=flops,
            peak_flops=peak,
            bytes_per_token=bytes_per_token,
            tensorboard=flags.tensorboard and processes.first(),
            tracker=tracker,
            kept=processes.first(),
        ) as log,
    ):
        state = loop.train(
            state,
            progress,
            provenance=provenance,
            batches=batches,
            store=store,
            compute=compute,
            cadence=cadence,
            stop=stop,
            log=log,
            step=step,
            sample=sampler.line if samples else None,
        )
    if setup.reference is not None and not stop:
        scale = sharding.put(weights.load(setup.reference)[0], mesh)
        loss = validation_loss(scale, batches, cadence.eval_batches, compute, stop)
        if loss is not None:
            print(f"for scale: {setup.reference}, {metrics.bits_per_byte(loss, bytes_per_token):.3f} bits per byte")
    model = processes.whole(state.model)
    if processes.first():
        sampler.show(model)
    if stop:
        raise stop.error(f"all {recipe.steps} steps are done, saved and verified")
    stop.ignore()
    print(f"\nnext: python scripts/generate.py --weights {run} --prompt {flags.prompt!r}")


def compile_in(
    pool: concurrent.futures.Executor, platform: str, compile_step: Callable[[], Callable[..., Any]]
) -> tuple[concurrent.futures.Future, Callable[..., Any]]:
    """Compiles in `pool`: the future, to wait for, and the step, whose first call waits for it.

    Says on a GPU that it takes long, and at the first call, from the caller's thread, how long it took.
    """
    silent = platform == "cpu"  # where it takes seconds
    if not silent:
        print("compiling   the training step: one to two minutes the first time", flush=True)

    def timed() -> tuple[Callable[..., Any], float]:
        began = time.perf_counter()
        return compile_step(), time.perf_counter() - began

    def step(*batch: Any) -> Any:
        nonlocal silent
        compiled, seconds = compiling.result()
        if not silent:
            print(f"compiled    the training step in {seconds:.1f} s", flush=True)
            silent = True
        return compiled(*batch)

    compiling = pool.submit(timed)
    return compiling, step


def announce(run: Path, flags: TrainingFlags, setup, device, kept: bool) -> None:
    """Prints what was decided."""
    import jax

    from smollm_jax.model import cost

    start, recipe, compute, cadence = setup.start, setup.start.recipe, setup.compute, setup.cadence
    if device.platform != "gpu":
        print("no GPU found: training on the CPU" + ("" if flags.recipe else ", at a demo size"))
    used = f"{compute.devices} of {jax.device_count()}"
    used += f" as {flags.mesh or f'data={compute.devices}'}" if compute.mesh else ""
    used += f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(f"device      {device.device_kind}, {used}, jax {jax.__version__}")
    print(f"model       {cost.count_parameters(start.config):,} parameters, {start.config}")
    begun = f"weights of {flags.init_from} ({start.bundle.origin})" if start.bundle else None
    begun = begun or f"recipe's init, seed {recipe.seed}"
    saved = start.saved and f"checkpoint of step {start.saved.progress.step}, verified"
    print(f"start       {saved or begun}")
    results = f" with {compute.dtype} results" if compute.operands != compute.dtype else ""
    instead = f" in blocks, for cudnn {setup.without_cudnn}" if setup.without_cudnn else ""
    attention = f"attention {compute.implementation}{instead}"
    print(f"products    {recipe.dtype}{results}, {attention}; weights, moments and loss float32")
    if device.platform == "gpu" and not cost.peak_flops(device.device_kind, recipe.dtype):
        print(cost.without_mfu(device.device_kind, recipe.dtype))
    tokens_per_step = f"{recipe.batch_size} x {recipe.sequence_length} = {recipe.tokens_per_step:,} tokens a step"
    if flags.recipe or not saved:
        print(f"recipe      {setup.recipe_name}")
    print(f"steps       {recipe.steps:,} of {tokens_per_step}, {recipe.schedule}, peak {recipe.learning_rate}")
    if start.defaults:
        print(f"            {start.defaults}; --learning-rate and --warmup-steps change that")
    warmup = f"warmup {recipe.warmup_steps} steps, weight decay {recipe.weight_decay}, seed {recipe.seed}"
    print(f"            {warmup}; saved every {cadence.save_every}, validated every {cadence.eval_every} steps")
    keeping = "; what a step frees is kept" if kept else ""
    limit = f"of {setup.limit / 1e9:.1f} GB" if setup.limit else "of what JAX does not say, unchecked"
    remat = f"remat {compute.remat}{'' if flags.remat else ' (chosen; --remat changes that)'}"
    print(f"memory      {setup.planned / 1e9:.1f} GB planned {limit}, on each device, {remat}{keeping}")
    print(f"run         {run}", flush=True)


def print_differences(saved, recipe, environment) -> None:
    """Says what is allowed to differ from the saved run and yet moves its numbers."""
    print(f"resumed from step {saved.progress.step}")
    if recipe.steps != saved.provenance.recipe.steps:
        was = saved.provenance.recipe.steps
        print(f"note: the schedule now ends at step {recipe.steps}, it was made for {was}")
    names = environment.keys() | saved.environment.keys()
    pairs = {name: (saved.environment.get(name), environment.get(name)) for name in sorted(names)}
    if differing := [f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new]:
        print(f"note: goes on within rounding, not bit for bit, for these differ: {', '.join(differing)}")


if __name__ == "__main__":
    run_main(main)
