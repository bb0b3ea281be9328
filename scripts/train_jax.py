"""Train SmolLM2 on text.

    python scripts/train_jax.py                                  # everything chosen for this machine
    python scripts/train_jax.py --resume                         # go on with the newest run
    python scripts/train_jax.py --data my_text/ --init-from assets/SmolLM2-135M-Instruct --learning-rate 1e-4
    python scripts/train_jax.py --mesh data=8 --batch-size 64    # on eight GPUs; docs/scaling.md for several machines
    python scripts/train_jax.py --recipe one-gpu-day --data DATA # a whole run by name

On a GPU: 5,000 steps of 8 x 2,048 tokens in bfloat16. Without one: the same 134.5M parameters at a demo size that
takes about 10 minutes on 2 cores. A flag left out is chosen by the device and printed before training starts.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Literal

import tyro

from smollm_jax import errors


@dataclasses.dataclass(frozen=True)
class Flags:
    recipe: str | None = None
    """A whole run's preset and numbers, which the flags below override: demo, gpu-demo, one-gpu-day, smollm2-135m or
    smollm2-135m-long (smollm_jax/recipes.py). Default: demo, or on a GPU gpu-demo."""
    preset: str | None = None
    """Model to train from scratch: see smollm_jax/config.py; default the recipe's, smollm2-135m-pretrain."""
    data: tuple[str, ...] | None = None
    """Prepared data sets (prepare_data.py), or text as it takes it, which is prepared under data/. Several are read as
    one, or in the proportion of weights: --data data/web:0.6 data/code:0.4. Default: assets/sotu."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json; default: --init-from's if it has one, else assets/tokenizer."""
    init_from: Path | None = None
    """Start from these weights (any kind convert_weights.py reads) instead of the recipe's init."""
    out: Path | None = None
    """Run folder; default: runs/<time>-<preset>, or with --resume the newest run under runs/."""
    resume: bool = False
    """Go on from the run's newest verified checkpoint, under the run's own recipe."""
    allow_change: tuple[str, ...] = ()
    """With --resume: what may differ from the saved run, by name (learning_rate, data, rope_theta ...). The batch of
    step n is that of the new recipe's step n."""
    allow_unverified: bool = False
    """With --resume: take a checkpoint that has no integrity.json."""
    steps: int | None = None
    """Optimizer steps in all."""
    batch_size: int | Literal["auto"] | None = None
    """Sequences a step; auto: the most that fit, see plan_memory.py. A resumed run keeps its number."""
    gradient_accumulation_steps: int | None = None
    """Parts a batch is computed in, one after another, to save memory; default 1."""
    sequence_length: int | None = None
    """Tokens a sequence."""
    learning_rate: float | None = None
    """Peak; default 1e-3 (the pre-training recipe's 3e-3 is for 1M tokens a step)."""
    schedule: Literal["wsd", "cosine"] | None = None
    """Warmup-stable-decay (default), or cosine."""
    warmup_steps: int | None = None
    """Default: 5 % of the steps."""
    decay_fraction: float | None = None
    """Share of the steps, at the end, in which wsd goes to 0; default 0.2."""
    weight_decay: float | None = None
    """Decoupled, on all parameters; default 0.01."""
    mask_documents: bool = False
    """Let tokens see their own document only, positions from 0 in each; the recipe's windows run across borders."""
    mesh: str | None = None
    """Devices to train on: data=8, fsdp=8 or data=4,fsdp=2; fsdp shares parameters and moments out. Default: one
    device, or with --distributed all of them along data."""
    distributed: bool = False
    """One of several processes of a run, met through Slurm, MPI or the three flags below; needs --out and prepared
    --data that all of them see."""
    coordinator_address: str | None = None
    """HOST:PORT where the first process listens."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the matrix products; weights and moments are float32. Default: bfloat16 on a GPU, float32 without."""
    seed: int | None = None
    """Of the init and of the order of the data; default 0."""
    attention: Literal["xla", "cudnn"] | None = None
    """Default: cudnn on a CUDA GPU in bfloat16, else xla."""
    save_every: int | None = None
    """Steps between checkpoints; default 500 on a GPU, 100 without. The last step is always saved."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    async_save: bool = False
    """Write checkpoints while training goes on, from a copy of the state in memory."""
    eval_every: int | None = None
    """Steps between validations on held-out text; default 250 on a GPU, 50 without."""
    log_every: int = 10
    """Steps between lines when the output is no terminal; metrics.jsonl has every step."""
    remat: Literal["none", "dots", "full"] = "dots"
    """What a layer keeps for its backward pass: all, the results of matrix products and attention, or its input."""
    unroll: int = 1
    """Layers laid out per step of the layer scan."""
    tensorboard: bool = False
    """Also write TensorBoard files into the run folder."""
    reference: Path | None = None
    """Weights to measure on the same held-out text at the end, for scale; default: assets/SmolLM2-135M-Instruct, where
    it has been fetched. Their tokenizer must be the run's."""
    prompt: str = "The quick brown fox"
    """Continued after the last step."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


REFERENCE = Path("assets/SmolLM2-135M-Instruct")
RECIPE_FLAGS = (
    "steps",
    "batch_size",
    "gradient_accumulation_steps",
    "sequence_length",
    "learning_rate",
    "schedule",
    "warmup_steps",
    "decay_fraction",
    "weight_decay",
    "mask_documents",
    "dtype",
    "seed",
)
GPU_CADENCE = {"save_every": 500, "eval_every": 250}
CPU_CADENCE = {"save_every": 100, "eval_every": 50}


def main(argv: list[str] | None = None) -> None:
    flags = tyro.cli(Flags, args=argv, description=__doc__)
    from smollm_jax.stop import Stop

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
        from smollm_jax import distributed

        distributed.connect(flags.coordinator_address, flags.num_processes, flags.process_id)
        if not distributed.first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # the first process speaks for all
        with distributed.one_for_all():
            begin(flags, stop, first=distributed.first())
    elif by_hand:
        raise errors.UsageError(f"--{by_hand[0].replace('_', '-')} says something about --distributed only")
    else:
        begin(flags, stop, first=True)


def begin(flags: Flags, stop, *, first: bool) -> None:
    """Trains in the run folder the flags mean, which the first of a run's processes holds a lock on."""
    from smollm_jax import recipes
    from smollm_jax.lock import RunLock

    if flags.resume:
        run = flags.out or newest_run()
        if not (run / "checkpoints").is_dir():
            raise errors.CheckpointError(f"--resume: {run / 'checkpoints'}: no such checkpoint folder")
    else:
        if flags.allow_change or flags.allow_unverified:
            raise errors.UsageError("--allow-change and --allow-unverified say something about --resume only")
        name = flags.preset or recipes.named(flags.recipe or "demo").preset
        run = flags.out or Path(f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{name}")
        refuse_used(run)
        # What a run left that died before its first checkpoint is replaced; it has a lock file from its start on.
        if any(run.glob("*")) and not (run / "lock").exists():
            raise errors.UsageError(f"{run}: exists and is no run of this trainer: name another --out")
    with RunLock(run) if first else contextlib.nullcontext():
        if not flags.resume:
            refuse_used(run)  # another trainer may have had it in between
        train_in(run, flags, stop)


def refuse_used(run: Path) -> None:
    """Raises `UsageError` when a run folder holds a checkpoint."""
    from smollm_jax.checkpoint import steps_in

    if steps := steps_in(run / "checkpoints"):
        raise errors.UsageError(f"{run}: holds a run up to step {steps[-1]}: add --resume, or name another --out")


def train_in(run: Path, flags: Flags, stop) -> None:
    """Trains in a run folder that is ours alone."""
    import jax
    import numpy as np

    from smollm_jax import (
        compilation_cache,
        cost,
        data,
        distributed,
        formats,
        memory,
        metrics,
        optimizer,
        recipes,
        sharding,
        train,
        train_step,
        weights,
    )
    from smollm_jax.checkpoint import CheckpointStore
    from smollm_jax.config import preset
    from smollm_jax.provenance import Provenance
    from smollm_jax.recipe import Recipe
    from smollm_jax.tokenizer import Tokenizer, folder_beside

    compilation_cache.enable()
    device = jax.local_devices()[0]
    layout = flags.mesh or (f"data={jax.device_count()}" if flags.distributed else None)
    mesh = sharding.make_mesh(layout) if layout else None
    devices = mesh.size if mesh else 1
    # In MiB, of which an int32 holds enough.
    limit = min(distributed.of_all(memory.available(device, -(-devices // jax.process_count())) >> 20)) << 20
    on_gpu = device.platform == "gpu"
    given = {name: getattr(flags, name) for name in RECIPE_FLAGS}
    given = {name: value for name, value in given.items() if value is not None and value is not False}  # 0 was given
    run_name = flags.recipe or ("gpu-demo" if on_gpu else "demo")
    named = recipes.named(run_name)
    largest = given.get("batch_size") == "auto"
    if largest:
        del given["batch_size"]
    source, start_from, bundle, saved = flags.data or ("assets/sotu",), str(flags.init_from or ""), None, None
    if flags.resume:
        with CheckpointStore(run / "checkpoints", create=False) as store:
            load = lambda step: train.load(store, step, mesh)  # noqa: E731
            saved = store.newest(load, allow_unverified=flags.allow_unverified)
        before = saved.provenance
        config = preset(flags.preset) if flags.preset else formats.read_config(run / "config.json")
        recipe = Recipe(**(dataclasses.asdict(before.recipe) | (named.fields if flags.recipe else {}) | given))
        source, start_from = flags.data or tuple(shlex.split(before.data)), start_from or before.start_from
        if start_from != before.start_from:
            began = before.start_from or "its recipe's init"
            raise errors.UsageError(f"--init-from {start_from}: this run began with {began}; leave it out")
    else:
        bundle = weights.read(flags.init_from) if flags.init_from else None
        wanted = preset(flags.preset or named.preset)
        if named.continues:
            if not bundle:
                raise errors.UsageError(f"--recipe {run_name} continues a run: add --init-from RUN")
            names = ("rope_theta", "max_position_embeddings")
            longer = dataclasses.replace(bundle.config, **{name: getattr(wanted, name) for name in names})
            bundle = dataclasses.replace(bundle, config=longer)
        config = bundle.config if bundle else wanted
        if flags.preset and config != wanted:
            raise errors.UsageError(f"--init-from {flags.init_from} is no {flags.preset}: leave --preset out")
        if largest:  # until it is known what else decides
            fields = named.fields | given
            given["batch_size"] = devices * fields.get("gradient_accumulation_steps", 1)
        recipe = named.resolve(given)
    if recipe.sequence_length > config.max_position_embeddings:
        raise errors.UsageError(
            f"--sequence-length {recipe.sequence_length} exceeds the model's {config.max_position_embeddings} positions"
        )
    if recipe.dtype == "float32":  # on a GPU JAX's default is TF32
        jax.config.update("jax_default_matmul_precision", "float32")
    # cuDNN's attention needs Ampere or later.
    fused = on_gpu and recipe.dtype == "bfloat16" and float(getattr(device, "compute_capability", "0")) >= 8
    attention = flags.attention or ("cudnn" if fused and not recipe.mask_documents else "xla")
    if attention == "cudnn" and not (on_gpu and recipe.dtype == "bfloat16"):
        raise errors.UsageError(
            f"--attention cudnn needs a CUDA GPU and bfloat16, not {device.platform}, {recipe.dtype}"
        )
    parts = recipe.gradient_accumulation_steps
    if recipe.batch_size % (parts * devices):
        raise errors.UsageError(
            f"--batch-size {recipe.batch_size} must divide by {devices} devices x {parts} gradient accumulation steps"
        )
    tokenizer_folder = flags.tokenizer or folder_beside(run if flags.resume else flags.init_from)
    tokenizer = Tokenizer.load(tokenizer_folder)
    document_end = tokenizer.eos_token_id if recipe.mask_documents else None
    compute = train_step.Compute(recipe.dtype, attention, flags.remat, flags.unroll, parts, mesh, document_end)
    if largest and not saved:
        recipe = memory.largest_batch(config, recipe, compute, device.platform, limit)
    planned, step = memory.plan(config, recipe, compute, device.platform).total, None
    if not saved or saved.progress.step < recipe.steps:  # compiles while weights and tokens are read
        arguments = limit, config, recipe, compute, device.platform
        compiling = concurrent.futures.ThreadPoolExecutor(1).submit(memory.compile_within, *arguments)
        step = lambda *batch: compiling.result()(*batch)  # noqa: E731
        if planned > limit / 2:  # or it is refused after hours of reading, or by a parameter that finds no room
            compiling.result()
    every = {name: getattr(flags, name) for name in CPU_CADENCE if getattr(flags, name) is not None}
    usual = train.Cadence(**(GPU_CADENCE if on_gpu else CPU_CADENCE))
    cadence = dataclasses.replace(saved.cadence if saved else usual, **every)
    reference = flags.reference or (REFERENCE if REFERENCE.is_dir() else None)
    if reference is not None and not same_tokens(tokenizer, tokenizer_folder, folder_beside(reference)):
        if flags.reference:
            raise errors.UsageError(f"--reference {reference}: its tokenizer is not that of {tokenizer_folder}")
        reference = None  # nobody asked for it
    if tokenizer.vocab_size > config.vocab_size:
        raise errors.UsageError(f"{tokenizer_folder} has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")

    if not on_gpu:
        print("no GPU found: training on the CPU" + ("" if flags.recipe else ", at a demo size"))
    used = f"{devices} of {jax.device_count()}" + (f" as {layout}" if mesh else "")
    used += f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(f"device      {device.device_kind}, {used}, jax {jax.__version__}")
    print(f"model       {cost.count_parameters(config):,} parameters, {config}")
    start = f"weights of {flags.init_from} ({bundle.origin})" if bundle else f"recipe's init, seed {recipe.seed}"
    print(f"start       {f'checkpoint of step {saved.progress.step}, verified' if saved else start}")
    print(f"products    {recipe.dtype}, attention {attention}; weights, moments and loss float32")
    tokens_per_step = f"{recipe.batch_size} x {recipe.sequence_length} = {recipe.tokens_per_step:,} tokens a step"
    if flags.recipe or not saved:
        print(f"recipe      {run_name}")
    print(f"steps       {recipe.steps:,} of {tokens_per_step}, {recipe.schedule}, peak {recipe.learning_rate}")
    warmup = f"warmup {recipe.warmup_steps} steps, weight decay {recipe.weight_decay}, seed {recipe.seed}"
    print(f"            {warmup}; saved every {cadence.save_every}, validated every {cadence.eval_every} steps")
    print(f"memory      {planned / 1e9:.1f} GB planned of {limit / 1e9:.1f} GB, on each device")
    print(f"run         {run}", flush=True)

    # Not stopped by a first signal: exit 75 promises a checkpoint.
    tokens = data.prepare(source, tokenizer_folder, Path("data"), None, tokenizer)
    batches = data.Batches(tokens, recipe)
    held_out = np.concatenate([batch[:, 1:].ravel() for batch in batches.validation(cadence.eval_batches)])
    bytes_per_token = tokenizer.byte_count(held_out.tolist()) / held_out.size
    named = shlex.join(source)
    print(f"data        {named}: {tokens.documents:,} documents, {tokens.tokens:,} tokens in {tokens.places}")
    provenance = Provenance(recipe, config, named, tokens.sha256, tokens.tokenizer_sha256, start_from)
    if saved:
        for change in provenance.check_resumes(saved.provenance, flags.allow_change):
            print(f"note: changed, as --allow-change says: {change}")
        print_differences(saved, recipe, train.environment_of(compute))
        progress, state = saved.progress, saved.state_under(config)
    else:
        progress = train.Progress()
        begun = sharding.put(weights.from_bundle(bundle), mesh) if bundle else None
        model = begun or train_step.fresh(config, recipe.seed, mesh)
        state = train_step.begin(model, optimizer.adamw(recipe), mesh)
        # Of a run that has no checkpoint, or has one no longer.
        if (run / "metrics.jsonl").exists() and distributed.first():
            old = next(name for n in itertools.count(1) if not (name := run / f"metrics.jsonl.{n}").exists())
            (run / "metrics.jsonl").rename(old)
            print(f"note: starts from the beginning, in a run without a checkpoint; its metrics are now {old}")
    if distributed.first():
        weights.write_run_files(run, config, formats.read_tokenizer_files(tokenizer_folder))
    flops = cost.flops_per_token(config, recipe.sequence_length)
    peak = cost.peak_flops(device.device_kind)
    peak = peak and peak * devices
    with (
        CheckpointStore(run / "checkpoints", keep=flags.keep, asynchronous=flags.async_save) as store,
        metrics.RunLog(
            run,
            log_every=flags.log_every,
            flops_per_token=flops,
            peak_flops=peak,
            bytes_per_token=bytes_per_token,
            tensorboard=flags.tensorboard and distributed.first(),
            kept=distributed.first(),
        ) as log,
    ):
        state = train.train(
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
        )
    if reference is not None and not stop:
        scale = sharding.put(weights.load(reference)[0], mesh)
        loss = train.validation_loss(scale, batches, cadence.eval_batches, compute, stop)
        if loss is not None:
            print(f"for scale: {reference}, {metrics.bits_per_byte(loss, bytes_per_token):.3f} bits per byte")
    model = distributed.whole(state.model)
    if distributed.first():
        show(model, tokenizer, flags.prompt, stop)
    if stop:
        raise stop.error(f"all {recipe.steps} steps are done, saved and verified")
    stop.ignore()
    print(f"\nnext: python scripts/generate.py --weights {run} --prompt {flags.prompt!r}")


def same_tokens(tokenizer, folder: Path, other: Path) -> bool:
    """Whether the tokenizer of a folder and that of another have the same entries; a file that is equal is not read."""
    one, two = (path / "tokenizer.json" for path in (folder, other))
    if two.is_file() and one.read_bytes() == two.read_bytes():
        return True
    return type(tokenizer).load(other).core.get_vocab() == tokenizer.core.get_vocab()


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


def newest_run() -> Path:
    """The run under runs/ that was last at work and has a checkpoint."""
    from smollm_jax.checkpoint import steps_in

    begun = sorted((lock.stat().st_mtime, lock.parent) for lock in Path("runs").glob("*/lock"))
    for _, run in reversed(begun):
        if steps_in(run / "checkpoints"):
            return run
        print(f"note: {run} has no checkpoint, looking at the run before it")
    raise errors.CheckpointError("--resume: no run under runs/ has a checkpoint; name one with --out")


def show(model, tokenizer, prompt: str, stop, max_new_tokens: int = 32) -> None:
    """Prints a greedy continuation of a prompt and the likeliest next tokens, unless a signal comes in between."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from smollm_jax.generate import NO_TOKEN, generate

    ids = tokenizer.encode(prompt)
    pieces = generate(model, [ids], max_new_tokens=max_new_tokens, eos_token_ids=model.config.eos_token_ids)
    new = np.concatenate([np.empty((1, 0), int), *itertools.takewhile(lambda _: not stop, pieces)], axis=1)[0]
    if stop:
        return
    print(f"\n{prompt} -> {tokenizer.decode(new[new != NO_TOKEN])!r}")
    probability = jax.nn.softmax(jax.jit(lambda model, ids: model(ids)[0, -1])(model, jnp.asarray([ids])))
    top = [f"{tokenizer.decode([int(i)])!r} {float(probability[i]):.3f}" for i in jnp.argsort(-probability)[:5]]
    print(f"predicted next token: {', '.join(top)}")


if __name__ == "__main__":
    errors.run(main)
