"""A fine-tuning run as its flags, its data, this machine and the checkpoint it resumes from decide it."""

import dataclasses
import itertools
import shlex
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax

from smollm_jax.config import Config
from smollm_jax.config.finetune_recipe import FinetuneRecipe, NamedFinetuning, choose
from smollm_jax.config.hf_config import read_config
from smollm_jax.config.recipe import check_batch_divides
from smollm_jax.data.examples.examples import Example, Pair, Report, read_examples, read_pairs
from smollm_jax.data.examples.packing import pair_length
from smollm_jax.data.mixture import parse_sources
from smollm_jax.errors import CheckpointError, UsageError
from smollm_jax.finetuning.batches import RowBatches, split
from smollm_jax.finetuning.chat_format import with_chat_format
from smollm_jax.finetuning.flags import Flags
from smollm_jax.finetuning.lora import abstract_training_state
from smollm_jax.model import precision
from smollm_jax.parallel import sharding
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runs.provenance import Provenance
from smollm_jax.runtime import cpu
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.training import memory
from smollm_jax.training.execution import ExecutionConfig, Intervals, default_unroll, fastest_attention
from smollm_jax.training.state import RestoredRun, restore_run
from smollm_jax.weights.adapter import fingerprint, parse_targets, read_adapter
from smollm_jax.weights.bundle import Bundle

GPU_INTERVALS, CPU_INTERVALS = Intervals(save_every=500, eval_every=250), Intervals(save_every=100, eval_every=20)


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that is decided; `set_up` makes it."""

    recipe: FinetuneRecipe
    recipe_name: str
    config: Config
    tokenizer: Tokenizer
    generation_config: dict[str, Any] | None
    execution: ExecutionConfig
    intervals: Intervals
    limit: int  # bytes of memory on each device; 0: JAX does not say
    planned: int  # bytes of them that a step is estimated to need
    batches: RowBatches
    held_out: list[Example]  # of pairs, the chosen answers; of several sources in turn
    train: int  # examples that are trained on
    notes: list[str]  # about the data, for the reader
    provenance: Provenance
    restored: RestoredRun | None


@dataclasses.dataclass(frozen=True)
class _Start:
    """What a run begins with: of its flags and the weights, or of its checkpoint."""

    tokenizer: Tokenizer
    config: Config
    generation_config: dict[str, Any] | None
    named: NamedFinetuning | None  # None: the recipe of the checkpoint
    recipe_name: str
    given: dict[str, Any]  # fields of the recipe that are decided
    draft: FinetuneRecipe  # as if there were one step in an epoch
    sources: Sequence[str]
    weights: str


def set_up(flags: Flags, run: Path, bundle: Bundle | None) -> Setup:
    """What to train, and how; raises an error that names the flag, the file or the field that does not fit.

    `bundle` has the weights to start from; None with --resume.
    """
    device = jax.local_devices()[0]
    mesh = sharding.make_mesh(flags.mesh) if flags.mesh else None
    devices = mesh.size if mesh else 1
    limit = memory.device_limit(device, devices)
    if bundle is None:
        restored = _restore(flags, run, mesh)
        start = _resumed(flags, run, restored.provenance)
    else:
        restored, start = None, _new(flags, bundle, device)
    _check_fits(start)
    recipe, parts, batches, notes = _batches(flags, start)
    config, tokenizer = start.config, start.tokenizer
    check_batch_divides(recipe.batch_size, devices, recipe.gradient_accumulation_steps)
    execution = _execution(flags, recipe, config, tokenizer, device, mesh, limit)
    usual = GPU_INTERVALS if device.platform == "gpu" else CPU_INTERVALS
    intervals = dataclasses.replace(restored.intervals if restored else usual, **flags.interval_fields())
    source = shlex.join(start.sources)
    return Setup(
        recipe=recipe,
        recipe_name=start.recipe_name,
        config=config,
        tokenizer=tokenizer,
        generation_config=start.generation_config,
        execution=execution,
        intervals=intervals,
        limit=limit,
        planned=memory.estimate(config, recipe, execution, device.platform).total,
        batches=batches,
        held_out=_in_turn([held_out for _, held_out in parts]),
        train=sum(len(train) for train, _ in parts),
        notes=notes,
        provenance=Provenance(recipe, config, source, batches.sha256, tokenizer.sha256, start.weights),
        restored=restored,
    )


def _in_turn(sources: Sequence[Sequence[Any]]) -> list[Example]:
    """The first example of each source, the second of each, and so on; of a pair, the chosen answer."""
    examples = [example for turn in itertools.zip_longest(*sources) for example in turn if example is not None]
    return [example.chosen if isinstance(example, Pair) else example for example in examples]


def _new(flags: Flags, bundle: Bundle, device: Any) -> _Start:
    """The start of a run from the weights in `bundle`."""
    assert flags.weights is not None
    tokenizer, config, generation_config = with_chat_format(Tokenizer.of_weights(flags.weights), bundle.config)
    generation_config = bundle.generation_config if generation_config is None else generation_config
    recipe_name, named = choose(flags.recipe, flags.method)
    given = flags.recipe_fields()
    known = named.fields | given
    if "dtype" not in known:
        fast = device.platform == "gpu" or cpu.has_fast_bfloat16()
        given["dtype"] = "bfloat16" if fast else "float32"
    if flags.eval_every == 0:
        given.setdefault("validation_fraction", 0.0)
    given |= _adapter_fields(flags, bundle, named)
    _check_method(flags, named.method)
    if named.method == "dpo" and "base_sha256" not in given:
        given["base_sha256"] = fingerprint(bundle)
    draft, weights = named.resolve(given, 1), str(flags.weights)
    return _Start(tokenizer, config, generation_config, named, recipe_name, given, draft, flags.data or (), weights)


def _resumed(flags: Flags, run: Path, saved: Provenance) -> _Start:
    """The start of a run from its checkpoint."""
    assert isinstance(saved.recipe, FinetuneRecipe)
    _check_method(flags, saved.recipe.method)
    _check_same_adapter(flags, saved.recipe)
    given = flags.recipe_fields()
    given.pop("lora_targets", None)  # checked above, and perhaps spelt in another way
    draft = dataclasses.replace(saved.recipe, **given)
    sources = flags.data or tuple(shlex.split(saved.data))
    config, tokenizer = read_config(run / "config.json"), Tokenizer.of_weights(run)
    recipe_name = flags.recipe or "that of the run"
    return _Start(tokenizer, config, None, None, recipe_name, given, draft, sources, saved.start_from)


def _check_fits(start: _Start) -> None:
    """Raises `UsageError` if there is no data, or the sequences or the tokenizer exceed the model."""
    if not start.sources:
        raise UsageError("--data: name the chats to learn from, a .jsonl file for example")
    length, most = start.draft.sequence_length, start.config.max_position_embeddings
    if length > most:
        raise UsageError(f"--sequence-length {length} exceeds the model's {most} positions")
    tokenizer = start.tokenizer
    if tokenizer.vocab_size > start.config.vocab_size:
        raise UsageError(f"{tokenizer.path} has {tokenizer.vocab_size} tokens, the model {start.config.vocab_size}")


def _batches(
    flags: Flags, start: _Start
) -> tuple[FinetuneRecipe, list[tuple[list[Any], list[Any]]], RowBatches, list[str]]:
    """The recipe with its number of steps; the examples trained on and held out, by source; batches; and notes."""
    draft, given, named = start.draft, start.given, start.named
    examples, shares, notes = _read(start.sources, start.tokenizer, draft, flags)
    if named and named.method == "dpo" and flags.sequence_length is None:
        longest = pair_length(list(itertools.chain(*examples)))
        given = given | {"sequence_length": min(draft.sequence_length, longest)}
        draft = named.resolve(given, 1)
    parts = [split(source, draft.validation_fraction, draft.seed) for source in examples]
    batches = RowBatches.of(parts, draft, shares)
    recipe = named.resolve(given, len(batches.train)) if named else draft
    return recipe, parts, batches.with_recipe(recipe), notes


def _read(
    sources: Sequence[str], tokenizer: Tokenizer, recipe: FinetuneRecipe, flags: Flags
) -> tuple[list[list[Any]], tuple[Fraction, ...], list[str]]:
    """The examples of a run, or its pairs, by source; the sources' shares; and notes. Without weights, one source."""
    options: dict[str, Any] = {"max_length": recipe.sequence_length, "on_bad_text": flags.on_bad_text}

    def read(paths: Sequence[Path]) -> tuple[list[Any], Report]:
        if recipe.method == "dpo":
            return read_pairs(paths, tokenizer, **options)
        return read_examples(paths, tokenizer, learn=recipe.learn, **options)

    paths, shares = parse_sources(sources)
    if shares is None:
        examples, report = read(paths)
        return [examples], (Fraction(1),), report.lines()
    examples, notes = [], []
    for path, share in zip(paths, shares, strict=True):
        source, report = read([path])
        examples.append(source)
        notes += [f"{float(share):.3g} of the rows from {path}", *report.lines()]
    return examples, shares, notes


def _check_method(flags: Flags, method: str) -> None:
    """Raises `UsageError` if flags are for another method than the run's."""
    if flags.method not in (None, method):
        raise UsageError(f"--method {flags.method}: this run's method is {method}; leave the flag out to resume it")
    if method == "dpo" and flags.learn is not None:
        raise UsageError("--learn is for --method sft: DPO learns the answers of its pairs")
    for name in ("beta", "loss_type", "label_smoothing"):
        if method != "dpo" and getattr(flags, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is for --method dpo")


def _adapter_fields(flags: Flags, bundle: Bundle, named: NamedFinetuning) -> dict[str, Any]:
    """The fields of a new run's recipe that concern its adapter; none if all parameters are trained."""
    fields: dict[str, Any]
    if flags.init_adapter is not None:
        if (flags.lora_rank, flags.lora_alpha, flags.lora_targets, flags.rslora) != (None, None, None, False):
            raise UsageError(
                "--init-adapter has its own rank, alpha and targets: leave the --lora flags out, all but --lora-dropout"
            )
        adapter = read_adapter(flags.init_adapter, bundle.config)
        fields = {"lora_rank": adapter.rank, "lora_alpha": adapter.alpha, "rslora": adapter.rslora}
        fields["lora_targets"] = ",".join(adapter.targets)
        if flags.lora_dropout is None:
            fields["lora_dropout"] = adapter.dropout
    elif flags.lora_rank is None:
        if (flags.lora_alpha, flags.lora_targets, flags.rslora, flags.lora_dropout) != (None, None, False, None):
            raise UsageError("--lora-alpha, --lora-targets, --rslora and --lora-dropout need --lora-rank")
        return {}
    elif flags.lora_rank < 1:
        raise UsageError(f"--lora-rank must be at least 1, got {flags.lora_rank}")
    else:
        fields = {"lora_alpha": 2.0 * flags.lora_rank if flags.lora_alpha is None else flags.lora_alpha}
        fields["lora_targets"] = ",".join(parse_targets(flags.lora_targets or "all-linear"))
    if flags.learning_rate is None and named.lora_learning_rate is not None:
        fields["learning_rate"] = named.lora_learning_rate
    return fields | {"base_sha256": fingerprint(bundle)}


def _check_same_adapter(flags: Flags, saved: FinetuneRecipe) -> None:
    """Raises `UsageError` if flags of a resumed run describe another adapter than the saved one."""
    if flags.init_adapter is not None:
        raise UsageError("--init-adapter is for a new run: leave it out to resume")
    targets = None if flags.lora_targets is None else ",".join(parse_targets(flags.lora_targets))
    given = {"lora_rank": flags.lora_rank, "lora_alpha": flags.lora_alpha, "lora_targets": targets}
    given["rslora"] = flags.rslora or None
    for name, value in given.items():
        if value is not None and value != getattr(saved, name):
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {value}: this run has {getattr(saved, name)}; leave the flag out to resume it")


def _restore(flags: Flags, run: Path, mesh: jax.sharding.Mesh | None) -> RestoredRun:
    """The run in its newest verified checkpoint."""
    with CheckpointStore(run / "checkpoints", create=False) as store:
        load = lambda step: restore_run(store, step, mesh, abstract_training_state)  # noqa: E731
        restored = store.restore_newest_valid(load, allow_unverified=flags.allow_unverified)
    saved = restored.provenance
    if not isinstance(saved.recipe, FinetuneRecipe):
        raise CheckpointError(f"--resume: {run} is a pre-training run: resume it with python scripts/train_jax.py")
    if flags.weights is not None and str(flags.weights) != saved.start_from:
        raise UsageError(f"--weights {flags.weights}: this run started from {saved.start_from}; leave the flag out")
    return restored


def _execution(
    flags: Flags,
    recipe: FinetuneRecipe,
    config: Config,
    tokenizer: Tokenizer,
    device: Any,
    mesh: jax.sharding.Mesh | None,
    limit: int,
) -> ExecutionConfig:
    """How a step is computed on this device, with attention masked across the examples of a row."""
    fastest, lacks = fastest_attention(device, recipe.dtype, recipe.sequence_length, config.head_dim, True)
    if flags.attention == "cudnn" and lacks:
        raise UsageError(f"--attention cudnn {lacks}; leave it out to attend in blocks")
    attention = flags.attention or fastest
    unroll = default_unroll(config, attention) if flags.unroll is None else flags.unroll
    dtype, operands = precision.activation_and_operand_dtypes(recipe.dtype, device.platform)
    steps = recipe.gradient_accumulation_steps
    remat, separator = flags.remat or "dots", tokenizer.eos_token_id
    execution = ExecutionConfig(dtype, attention, remat, unroll, steps, mesh, separator, operands)
    if flags.remat is None:
        return memory.choose_remat(config, recipe, execution, device.platform, limit)
    return execution
