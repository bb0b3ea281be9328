"""Resolves flags, device and resumed run into the settings of a training, before text is read or a step compiled."""

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from smollm_jax.config import Config, Recipe, named_runs, preset
from smollm_jax.config.hf_config import read_config
from smollm_jax.config.recipe import check_batch_divides
from smollm_jax.errors import UsageError
from smollm_jax.model import precision
from smollm_jax.model.attention import Implementation
from smollm_jax.parallel import processes, sharding
from smollm_jax.runs.checkpoint import CheckpointStore
from smollm_jax.runtime import cpu
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.tokenizer.source import own_tokenizer
from smollm_jax.training import inputs, memory
from smollm_jax.training.execution import ExecutionConfig, Intervals, default_unroll, fastest_attention
from smollm_jax.training.flags import TrainingFlags
from smollm_jax.training.state import RestoredRun, restore_run
from smollm_jax.weights.bundle import Bundle

COMPARE_WITH = Path("assets/SmolLM2-135M-Instruct")  # default of --compare-with
GPU_INTERVALS, CPU_INTERVALS = Intervals(save_every=500, eval_every=250), Intervals(save_every=100, eval_every=50)


@dataclasses.dataclass(frozen=True)
class StartingPoint:
    """What a run starts from: a checkpoint, weights, or a random initialization."""

    config: Config
    recipe: Recipe
    source: tuple[str, ...]  # the data, as `open_mixture` takes it
    start_from: str  # --init-from of the run's first start; "" for a random initialization
    defaults: str = ""  # which defaults of peak and warm-up apply, and why
    bundle: Bundle | None = None
    restored: RestoredRun | None = None


@dataclasses.dataclass(frozen=True)
class Setup:
    """The settings of a training, resolved by `set_up`."""

    start: StartingPoint
    recipe_name: str
    execution: ExecutionConfig
    intervals: Intervals
    limit: int  # bytes of memory on each device; 0: JAX reports no limit
    planned: int  # bytes that a step is estimated to need on each device
    tokenizer: Tokenizer
    compare_with: Path | None
    why_not_cudnn: str = ""  # the reason, if a GPU's default attention is not cuDNN's


def set_up(flags: TrainingFlags, run: Path, read_weights: Callable[[], Bundle] | None) -> Setup:
    """The settings of a training; raises an error that names the flag, file or field at fault.

    `read_weights` reads the weights to start from; None without --init-from, and with --resume.
    """
    device = jax.local_devices()[0]
    on_gpu = device.platform == "gpu"
    mesh_text = flags.mesh or (f"data={jax.device_count()}" if flags.distributed else None)
    mesh = sharding.make_mesh(mesh_text) if mesh_text else None
    devices = mesh.size if mesh else 1
    # In MiB, because `all_gather_int` exchanges int32.
    limit = min(processes.all_gather_int(memory.device_limit(device, -(-devices // jax.process_count())) >> 20)) << 20
    # Weights are read in the background meanwhile.
    tokenizer = Tokenizer.of_weights(run if flags.resume else flags.init_from, flags.tokenizer)
    recipe_name, given = flags.recipe or ("gpu-demo" if on_gpu else "demo"), flags.recipe_fields()
    if not flags.resume and "dtype" not in named_runs.by_name(recipe_name).fields | given:
        given["dtype"] = "bfloat16" if on_gpu or cpu.has_fast_bfloat16() else "float32"
    if auto_batch := given.get("batch_size") == "auto":
        del given["batch_size"]
    if flags.resume:
        start = _resume(flags, run, given, mesh)
    else:
        named = named_runs.by_name(recipe_name)
        if auto_batch:  # a placeholder, until the memory estimate below
            accumulation_steps = (named.fields | given).get("gradient_accumulation_steps", 1)
            given["batch_size"] = devices * accumulation_steps
        start = _start_new(flags, recipe_name, given, read_weights)
    config, recipe = start.config, start.recipe
    if recipe.sequence_length > config.max_position_embeddings:
        raise UsageError(
            f"--sequence-length {recipe.sequence_length} exceeds the model's {config.max_position_embeddings} positions"
        )
    attention, why_not_cudnn = _attention(flags, recipe, config, device)
    accumulation_steps = recipe.gradient_accumulation_steps
    check_batch_divides(recipe.batch_size, devices, accumulation_steps)
    separator_id = tokenizer.eos_token_id if recipe.mask_documents else None
    unroll = default_unroll(config, attention) if flags.unroll is None else flags.unroll
    dtype, operands = precision.activation_and_operand_dtypes(recipe.dtype, device.platform)
    execution = ExecutionConfig(
        dtype, attention, flags.remat or "dots", unroll, accumulation_steps, mesh, separator_id, operands
    )
    if auto_batch and not start.restored:
        if not limit:
            raise UsageError(
                f"--batch-size auto: JAX does not report how much memory {device.device_kind} has; give a number"
            )
        recipe = memory.largest_batch(config, recipe, execution, device.platform, limit)
        start = dataclasses.replace(start, recipe=recipe)
    if flags.remat is None:
        execution = memory.choose_remat(config, recipe, execution, device.platform, limit)
    planned = memory.estimate(config, recipe, execution, device.platform).total
    defaults = GPU_INTERVALS if on_gpu else CPU_INTERVALS
    intervals = dataclasses.replace(start.restored.intervals if start.restored else defaults, **flags.interval_fields())
    if start.restored:
        inputs.check_sources(start.source)
    compare_with = _compare_with(flags, tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(
            f"{tokenizer.path}: its {tokenizer.vocab_size} tokens exceed the model's vocabulary of {config.vocab_size}"
        )
    return Setup(start, recipe_name, execution, intervals, limit, planned, tokenizer, compare_with, why_not_cudnn)


def _resume(flags: TrainingFlags, run: Path, given: dict[str, Any], mesh: jax.sharding.Mesh | None) -> StartingPoint:
    """The newest verified checkpoint of a run, with the run's recipe; fields in `given` override it."""
    named = named_runs.by_name(flags.recipe).fields if flags.recipe else {}
    with CheckpointStore(run / "checkpoints", create=False) as store:
        load = lambda step: restore_run(store, step, mesh)  # noqa: E731
        restored = store.restore_newest_valid(load, allow_unverified=flags.allow_unverified)
    saved = restored.provenance
    config = preset(flags.preset) if flags.preset else read_config(run / "config.json")
    recipe = Recipe(**(dataclasses.asdict(saved.recipe) | named | given))
    start_from = str(flags.init_from or "") or saved.start_from
    if start_from != saved.start_from:
        original = saved.start_from or "a random initialization"
        raise UsageError(f"--init-from {start_from}: this run started from {original}; leave the flag out to resume it")
    source = flags.data or tuple(shlex.split(saved.data))
    return StartingPoint(config, recipe, source, start_from, restored=restored)


def _start_new(
    flags: TrainingFlags, recipe_name: str, given: dict[str, Any], read_weights: Callable[[], Bundle] | None
) -> StartingPoint:
    """A new run, from weights if `read_weights` is given."""
    named = named_runs.by_name(recipe_name)
    bundle = read_weights() if read_weights else None
    preset_config = preset(flags.preset or named.preset)
    if named.continues_weights:
        if not bundle:
            raise UsageError(f"--recipe {recipe_name} continues from trained weights: add --init-from RUN")
        names = ("rope_theta", "max_position_embeddings")
        longer = dataclasses.replace(bundle.config, **{name: getattr(preset_config, name) for name in names})
        bundle = dataclasses.replace(bundle, config=longer)
    config = bundle.config if bundle else preset_config
    if flags.preset and config != preset_config:
        raise UsageError(
            f"--init-from {flags.init_from}: its config differs from --preset {flags.preset}; leave --preset out"
        )
    source, start_from = flags.data or ("assets/sotu",), str(flags.init_from or "")
    trained = bundle is not None
    recipe, defaults = named.resolve(given, trained=trained), named.explain(given, trained=trained)
    return StartingPoint(config, recipe, source, start_from, defaults, bundle)


def _attention(flags: TrainingFlags, recipe: Recipe, config: Config, device: Any) -> tuple[Implementation, str]:
    """--attention, or by default cuDNN's if it runs here; and on a GPU the reason if it does not.

    Raises `UsageError` for --attention cudnn if it does not run here.
    """
    length, documents = recipe.sequence_length, recipe.mask_documents
    fastest, lacks = fastest_attention(device, recipe.dtype, length, config.head_dim, documents)
    if flags.attention == "cudnn" and lacks:
        raise UsageError(f"--attention cudnn {lacks}; leave it out to use XLA's blocked attention")
    if flags.attention:
        return flags.attention, ""
    return fastest, lacks if device.platform == "gpu" else ""


def _compare_with(flags: TrainingFlags, tokenizer: Tokenizer) -> Path | None:
    """The weights to compare with; raises `UsageError` if --compare-with names weights with another tokenizer."""
    path = flags.compare_with or (COMPARE_WITH if COMPARE_WITH.is_dir() else None)
    if path is None or _same_vocabulary(tokenizer, path):
        return path
    if flags.compare_with:
        raise UsageError(f"--compare-with {path}: its tokenizer differs from that of {tokenizer.path}")
    return None  # the default only


def _same_vocabulary(tokenizer: Tokenizer, weights: Path) -> bool:
    """Whether weights have a tokenizer with the same vocabulary; parses their tokenizer.json only if it differs."""
    own = own_tokenizer(weights)
    if own is None:
        return False
    content = own / "tokenizer.json"
    if content.is_file() and content.read_bytes() == tokenizer.files.get("tokenizer.json"):
        return True
    return Tokenizer.load(own).core.get_vocab() == tokenizer.core.get_vocab()
