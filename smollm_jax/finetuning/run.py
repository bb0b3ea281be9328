"""A fine-tuning run from its flags to its last checkpoint: `run_finetuning` is the table of contents."""

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from smollm_jax import weights
from smollm_jax.config.finetune_recipe import FinetuneRecipe
from smollm_jax.config.generation_config import GenerationConfig
from smollm_jax.finetuning import answers, lora, reference
from smollm_jax.finetuning.answers import Question
from smollm_jax.finetuning.flags import Flags
from smollm_jax.finetuning.lora import Adapted, abstract_training_state
from smollm_jax.finetuning.objectives import LearntTokens, PreferencePairs
from smollm_jax.finetuning.setup import Setup, set_up
from smollm_jax.model import cost
from smollm_jax.model.smollm import SmolLM
from smollm_jax.parallel import processes, sharding
from smollm_jax.runs import metrics
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runs.folder import write_run_files
from smollm_jax.runs.tracking import Tracker
from smollm_jax.runtime import allocator, compilation_cache
from smollm_jax.runtime.invocation import as_typed
from smollm_jax.runtime.signals import StopSignal
from smollm_jax.runtime.startup import QuickStart
from smollm_jax.training import memory, optimizer
from smollm_jax.training.announce import print_resume_differences
from smollm_jax.training.loop import Trainer
from smollm_jax.training.loss import Objective
from smollm_jax.training.run import compile_in_background
from smollm_jax.training.state import Progress, TrainState, init_train_state, recorded_environment
from smollm_jax.training.train_step import Step
from smollm_jax.weights.adapted import read_base
from smollm_jax.weights.adapter import ADAPTER, read_adapter, write_adapter
from smollm_jax.weights.bundle import Bundle


def objective_of(recipe: FinetuneRecipe) -> Objective:
    """What a run minimizes."""
    objective: Objective = LearntTokens()
    if recipe.method == "dpo":
        objective = PreferencePairs(recipe.loss_type, recipe.beta, recipe.label_smoothing)
    return Adapted(objective, lora.scale_of(recipe), recipe.lora_dropout) if recipe.lora_rank else objective


def run_finetuning(run: Path, flags: Flags, stop: StopSignal, startup: QuickStart, *, retained: bool) -> None:
    """Fine-tunes in a run folder that is ours alone; `retained`: glibc reuses freed memory."""
    compilation_cache.enable()
    bundle = weights.read(flags.weights, mapped=True) if flags.weights and not flags.resume else None
    setup = set_up(flags, run, bundle)
    if setup.recipe.dtype == "float32":  # on a GPU JAX's default is TF32
        jax.config.update("jax_default_matmul_precision", "float32")
    device = jax.local_devices()[0]
    if retained and (setup.planned > setup.limit / 2 or device.platform != "cpu"):
        allocator.restore_defaults()
    announce(run, flags, setup, device, bundle)
    step = compile_ahead(setup, device)
    startup.end()
    progress, state, frozen = initial_state(run, flags, setup, bundle)
    generation = setup.generation_config if bundle else None
    if bundle:
        write_run_files(run, setup.config, setup.tokenizer.files, generation_config=generation)
    room = setup.config.max_position_embeddings - answers.NEW_TOKENS
    questions = answers.questions_of(flags.prompt, setup.held_out, setup.tokenizer, room)
    ends = GenerationConfig.from_values(generation, setup.config, f"{run}: generation_config").eos_token_ids

    def reply(trained: Any) -> list[str] | None:
        model = trained if frozen is None else lora.merge(frozen, trained, lora.scale_of(setup.recipe))
        model = processes.gather_to_local_device(model)
        return answers.answers_of(model, questions, setup.tokenizer, ends, stop)

    if setup.recipe.method == "dpo":
        fill_reference(run, setup, state, frozen, stop)
    if progress.step == 0 and (before := reply(state.model)):
        answers.write_before(run, questions, before)
    state = fit(run, flags, setup, progress, state, frozen, stop, step)
    finish(run, setup, questions, reply(state.model), stop)


def announce(run: Path, flags: Flags, setup: Setup, device: Any, bundle: Bundle | None) -> None:
    """Prints what was decided."""
    recipe, execution, intervals = setup.recipe, setup.execution, setup.intervals
    devices = f"{execution.devices} of {jax.device_count()}{f' as {flags.mesh}' if flags.mesh else ''}"
    print(f"device      {device.device_kind}, {devices}, jax {jax.__version__}")
    parameters = cost.count_parameters(setup.config)
    if recipe.lora_rank:
        trained = abstract_training_state(setup.config, recipe).model
        count = sum(leaf.size for leaf in jax.tree.leaves(trained))
        print(f"model       {parameters:,} parameters, not trained; an adapter of {count:,} parameters, trained")
        numbers = f"rank {recipe.lora_rank}, alpha {recipe.lora_alpha:g}{', rslora' if recipe.rslora else ''}"
        numbers += f", dropout {recipe.lora_dropout:g}" if recipe.lora_dropout else ""
        print(f"adapter     {numbers}, on {recipe.lora_targets.replace(',', ', ')}; newest in {run / ADAPTER}")
    else:
        print(f"model       {parameters:,} parameters, all of them trained")
    if setup.restored:
        print(f"start       checkpoint of step {setup.restored.progress.step}, verified")
    elif bundle:
        print(f"start       weights of {flags.weights} ({bundle.origin})")
    for number, note in enumerate(setup.notes):
        print(f"{'' if number else 'data':<12}{note}")
    examples, kind = ("pairs", "pairs of ") if recipe.method == "dpo" else ("examples", "packed " * recipe.packing)
    rows = f"{len(setup.batches.train):,} {kind}rows of {recipe.sequence_length} tokens"
    print(f"            trained on {setup.train:,} {examples} in {rows}; {len(setup.held_out):,} {examples} held out")
    results = f" with {execution.dtype} results" if execution.operands != execution.dtype else ""
    attention = f"attention {execution.attention}"
    print(f"precision   {recipe.dtype} matmuls{results}, {attention}; weights, optimizer state and loss in float32")
    learns = f"loss {recipe.loss_type}, beta {recipe.beta:g}" if recipe.method == "dpo" else f"learns {recipe.learn}"
    print(f"recipe      {setup.recipe_name}: {recipe.method}, {learns}")
    epochs = recipe.steps * recipe.batch_size / len(setup.batches.train)
    unit = "pairs" if recipe.method == "dpo" else "rows"
    print(
        f"steps       {recipe.steps:,} of {recipe.batch_size} {unit}, {epochs:.3g} epochs; {recipe.schedule} schedule,"
    )
    peak = f"peak {recipe.learning_rate}, warm-up {recipe.warmup_steps} steps, weight decay {recipe.weight_decay}"
    print(f"            {peak}, seed {recipe.seed}")
    every = [f"every {n} steps" if n else "after the last step" for n in (intervals.save_every, intervals.eval_every)]
    print(f"            checkpoints {every[0]}" + (f", validation {every[1]}" if setup.held_out else ", no validation"))
    limit = f" of {setup.limit / 1e9:.1f} GB on each device" if setup.limit else ""
    print(f"memory      {setup.planned / 1e9:.1f} GB estimated{limit}, remat {execution.remat}")
    print(f"run         {run}", flush=True)


def compile_ahead(setup: Setup, device: Any) -> Step | None:
    """The train step, which is being compiled; None if the run has no step left to do."""
    if setup.restored and setup.restored.progress.step >= setup.recipe.steps:
        return None
    dtypes = setup.batches.dtypes
    batch = {name: jax.ShapeDtypeStruct(shape, dtypes[name]) for name, shape in setup.batches.shapes.items()}
    compile_step = functools.partial(
        memory.compile_within,
        setup.limit,
        setup.config,
        setup.recipe,
        setup.execution,
        device.platform,
        objective=objective_of(setup.recipe),
        batch=batch,
        **lora.compile_options(setup.config, setup.recipe),
    )
    return compile_in_background(ThreadPoolExecutor(1), device.platform, compile_step)[1]


def initial_state(
    run: Path, flags: Flags, setup: Setup, bundle: Bundle | None
) -> tuple[Progress, TrainState, SmolLM | None]:
    """Progress and state of the resumed checkpoint or of a new run; and the frozen base model if it has an adapter."""
    restored, recipe, mesh = setup.restored, setup.recipe, setup.execution.mesh
    if restored is not None:
        for change in setup.provenance.check_resumes(restored.provenance, flags.allow_change):
            print(f"note: changed, allowed by --allow-change: {change}")
        print_resume_differences(restored, recipe, recorded_environment(setup.execution))
        if not recipe.lora_rank:
            return restored.progress, restored.state, None
        bundle = read_base(setup.provenance.start_from, recipe.base_sha256, run)
    assert bundle is not None
    bundle.config = setup.config  # its special ids are those of a chat
    model = sharding.shard_params(weights.from_bundle(bundle), mesh)
    bundle.tensors.clear()
    if restored is not None:
        return restored.progress, restored.state, model
    if not recipe.lora_rank:
        return Progress(), init_train_state(model, optimizer.adamw(recipe), mesh), None
    if flags.init_adapter is None:
        pairs = lora.init_pairs(setup.config, recipe)
    else:
        pairs = lora.pairs_of(read_adapter(flags.init_adapter, setup.config))
        if recipe.method == "dpo":
            write_adapter(run / reference.ADAPTER, lora.adapter_of(pairs, recipe, setup.provenance.start_from))
    pairs = sharding.shard_params(pairs, mesh)
    return Progress(), init_train_state(pairs, optimizer.adamw(recipe), mesh), model


def fill_reference(run: Path, setup: Setup, state: TrainState, frozen: SmolLM | None, stop: StopSignal) -> None:
    """Fills in the log-probabilities of a DPO run's answers under the model that it started from."""
    recipe, adapter = setup.recipe, run / reference.ADAPTER

    def load() -> SmolLM:
        model = frozen
        if model is None and setup.restored is None:
            model = state.model
        elif model is None:
            bundle = read_base(setup.provenance.start_from, recipe.base_sha256, run)
            bundle.config = setup.config
            model = weights.from_bundle(bundle)
        model = processes.gather_to_local_device(model)
        if adapter.is_dir():
            pairs = lora.pairs_of(read_adapter(adapter, setup.config))
            model = lora.with_pairs(model, pairs, lora.scale_of(recipe))
        return model

    identity = reference.fingerprint(
        setup.batches, recipe.base_sha256, adapter if adapter.is_dir() else None, recipe.dtype
    )
    reference.fill(
        setup.batches, run / reference.FILE, identity, load, setup.execution, setup.intervals.eval_batches, stop
    )


def fit(
    run: Path,
    flags: Flags,
    setup: Setup,
    progress: Progress,
    state: TrainState,
    frozen: SmolLM | None,
    stop: StopSignal,
    step: Step | None,
) -> TrainState:
    """The state after the last step; checkpoints and metrics are in the run folder."""
    recipe, execution = setup.recipe, setup.execution
    peak = cost.peak_flops(jax.local_devices()[0].device_kind, recipe.dtype)
    metadata = setup.provenance.meta() | {"environment": recorded_environment(execution)}
    with (
        CheckpointStore(run / "checkpoints", keep=flags.keep_checkpoints, asynchronous=flags.async_save) as store,
        metrics.RunLog(
            run,
            log_every=flags.log_every,
            flops_per_token=cost.flops_per_token(setup.config, recipe.sequence_length),
            peak_flops=peak and peak * execution.devices,
            tensorboard=flags.tensorboard,
            tracker=Tracker(flags.track, run, metadata) if flags.track else None,
        ) as log,
    ):
        return Trainer(
            state,
            progress,
            provenance=setup.provenance,
            batches=setup.batches,
            store=store,
            execution=execution,
            intervals=setup.intervals,
            stop=stop,
            log=log,
            step=step,
            objective=objective_of(recipe),
            frozen=frozen,
            saved=functools.partial(write_newest_adapter, run, setup) if recipe.lora_rank else None,
        ).run()


def write_newest_adapter(run: Path, setup: Setup, pairs: lora.Pairs) -> None:
    """Writes the pairs of the checkpoint just saved to the run's adapter folder."""
    pairs = processes.gather_to_local_device(pairs)
    write_adapter(run / ADAPTER, lora.adapter_of(pairs, setup.recipe, setup.provenance.start_from))


def finish(run: Path, setup: Setup, questions: list[Question], after: list[str] | None, stop: StopSignal) -> None:
    """Shows the answers before and after; raises `StoppedError` if a signal came after the last step."""
    if after is not None and questions:
        print(answers.comparison(answers.write_after(run, questions, after)))
    if stop:
        raise stop.error(f"all {setup.recipe.steps} steps are done, saved and verified")
    stop.ignore()
    print(f"\nnext: {as_typed('python scripts/chat.py')} --weights {run}")
