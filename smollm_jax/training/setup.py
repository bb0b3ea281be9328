"""A training as its flags, this machine and the run that goes on decide it, before text is read or a step compiled."""

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
from smollm_jax.training.execution import Cadence, Compute, fastest_attention, layers_at_once
from smollm_jax.training.flags import TrainingFlags
from smollm_jax.training.state import Saved, restore_run
from smollm_jax.weights.bundle import Bundle

REFERENCE = Path("assets/SmolLM2-135M-Instruct")
GPU_CADENCE, CPU_CADENCE = Cadence(save_every=500, eval_every=250), Cadence(save_every=100, eval_every=50)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins or goes on: with saved state, with weights, or with its recipe's init."""

    config: Config
    recipe: Recipe
    source: tuple[str, ...]  # of the text, as `open_mixture` takes it
    start_from: str  # as --init-from named the weights the run began with; "" for the init
    defaults: str = ""  # which peak and warm-up were chosen, and why
    bundle: Bundle | None = None
    saved: Saved | None = None


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that is decided; `set_up` makes it."""

    start: Start
    recipe_name: str
    compute: Compute
    cadence: Cadence
    limit: int  # bytes of memory, on each device; 0: JAX does not say
    planned: int  # bytes of them that a step is planned to need
    tokenizer: Tokenizer
    reference: Path | None
    without_cudnn: str = ""  # what cuDNN's attention needs that a GPU's run does not give, where nobody chose


def set_up(flags: TrainingFlags, run: Path, read: Callable[[], Bundle] | None) -> Setup:
    """What to train, and how; raises an error that names the flag, the file or the field that does not fit.

    `read` gives the weights to begin with; None without --init-from, and for --resume.
    """
    device = jax.local_devices()[0]
    on_gpu = device.platform == "gpu"
    layout = flags.mesh or (f"data={jax.device_count()}" if flags.distributed else None)
    mesh = sharding.make_mesh(layout) if layout else None
    devices = mesh.size if mesh else 1
    # In MiB, of which an int32 holds enough.
    limit = min(processes.all_gather_int(memory.available(device, -(-devices // jax.process_count())) >> 20)) << 20
    # While weights are read.
    tokenizer = Tokenizer.of_weights(run if flags.resume else flags.init_from, flags.tokenizer)
    recipe_name, given = flags.recipe or ("gpu-demo" if on_gpu else "demo"), flags.recipe_fields()
    if not flags.resume and "dtype" not in named_runs.by_name(recipe_name).fields | given:
        given["dtype"] = "bfloat16" if on_gpu or cpu.has_fast_bfloat16() else "float32"
    if largest := given.get("batch_size") == "auto":
        del given["batch_size"]
    if flags.resume:
        start = _going_on(flags, run, given, mesh)
    else:
        named = named_runs.by_name(recipe_name)
        if largest:  # until it is known what else decides
            parts = (named.fields | given).get("gradient_accumulation_steps", 1)
            given["batch_size"] = devices * parts
        start = _beginning(flags, recipe_name, given, read)
    config, recipe = start.config, start.recipe
    if recipe.sequence_length > config.max_position_embeddings:
        raise UsageError(
            f"--sequence-length {recipe.sequence_length} exceeds the model's {config.max_position_embeddings} positions"
        )
    attention, without_cudnn = _attention(flags, recipe, config, device)
    parts = recipe.gradient_accumulation_steps
    check_batch_divides(recipe.batch_size, devices, parts)
    document_end = tokenizer.eos_token_id if recipe.mask_documents else None
    unroll = layers_at_once(config, attention) if flags.unroll is None else flags.unroll
    dtype, operands = precision.activation_and_operand_dtypes(recipe.dtype, device.platform)
    compute = Compute(dtype, attention, flags.remat or "dots", unroll, parts, mesh, document_end, operands)
    if largest and not start.saved:
        if not limit:
            raise UsageError(
                f"--batch-size auto: JAX does not say how much memory {device.device_kind} has: give a number"
            )
        recipe = memory.largest_batch(config, recipe, compute, device.platform, limit)
        start = dataclasses.replace(start, recipe=recipe)
    if flags.remat is None:
        compute = memory.fastest(config, recipe, compute, device.platform, limit)
    planned = memory.plan(config, recipe, compute, device.platform).total
    usual = GPU_CADENCE if on_gpu else CPU_CADENCE
    cadence = dataclasses.replace(start.saved.cadence if start.saved else usual, **flags.cadence_fields())
    if start.saved:
        inputs.check_sources(start.source)
    reference = _reference(flags, tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(f"{tokenizer.path} has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    return Setup(start, recipe_name, compute, cadence, limit, planned, tokenizer, reference, without_cudnn)


def _going_on(flags: TrainingFlags, run: Path, given: dict[str, Any], mesh: jax.sharding.Mesh | None) -> Start:
    """From the newest verified checkpoint of a run, under its own recipe and what was given."""
    named = named_runs.by_name(flags.recipe).fields if flags.recipe else {}
    with CheckpointStore(run / "checkpoints", create=False) as store:
        load = lambda step: restore_run(store, step, mesh)  # noqa: E731
        saved = store.restore_newest_valid(load, allow_unverified=flags.allow_unverified)
    before = saved.provenance
    config = preset(flags.preset) if flags.preset else read_config(run / "config.json")
    recipe = Recipe(**(dataclasses.asdict(before.recipe) | named | given))
    start_from = str(flags.init_from or "") or before.start_from
    if start_from != before.start_from:
        began = before.start_from or "its recipe's init"
        raise UsageError(f"--init-from {start_from}: this run began with {began}; leave it out")
    return Start(config, recipe, flags.data or tuple(shlex.split(before.data)), start_from, saved=saved)


def _beginning(
    flags: TrainingFlags, recipe_name: str, given: dict[str, Any], read: Callable[[], Bundle] | None
) -> Start:
    """With the weights that were named, or with none."""
    named = named_runs.by_name(recipe_name)
    bundle = read() if read else None
    wanted = preset(flags.preset or named.preset)
    if named.continues_weights:
        if not bundle:
            raise UsageError(f"--recipe {recipe_name} continues a run: add --init-from RUN")
        names = ("rope_theta", "max_position_embeddings")
        longer = dataclasses.replace(bundle.config, **{name: getattr(wanted, name) for name in names})
        bundle = dataclasses.replace(bundle, config=longer)
    config = bundle.config if bundle else wanted
    if flags.preset and config != wanted:
        raise UsageError(f"--init-from {flags.init_from} is no {flags.preset}: leave --preset out")
    source, start_from = flags.data or ("assets/sotu",), str(flags.init_from or "")
    trained = bundle is not None
    recipe, defaults = named.resolve(given, trained=trained), named.explain(given, trained=trained)
    return Start(config, recipe, source, start_from, defaults, bundle)


def _attention(flags: TrainingFlags, recipe: Recipe, config: Config, device: Any) -> tuple[Implementation, str]:
    """The implementation that was asked for, or cuDNN's where it runs, and why it does not on a GPU.

    Raises `UsageError` where cuDNN's was asked for and does not run.
    """
    length, documents = recipe.sequence_length, recipe.mask_documents
    fastest, needs = fastest_attention(device, recipe.dtype, length, config.head_dim, documents)
    if flags.attention == "cudnn" and needs:
        raise UsageError(f"--attention cudnn {needs}; leave it out to attend in blocks")
    if flags.attention:
        return flags.attention, ""
    return fastest, needs if device.platform == "gpu" else ""


def _reference(flags: TrainingFlags, tokenizer: Tokenizer) -> Path | None:
    """The weights to measure for scale; raises `UsageError` when those that were named read other tokens."""
    reference = flags.reference or (REFERENCE if REFERENCE.is_dir() else None)
    if reference is None or _same_tokens(tokenizer, reference):
        return reference
    if flags.reference:
        raise UsageError(f"--reference {reference}: its tokenizer is not that of {tokenizer.path}")
    return None  # nobody asked for it


def _same_tokens(tokenizer: Tokenizer, weights: Path) -> bool:
    """Whether weights have a tokenizer with the same entries; a file that is equal is not read again."""
    own = own_tokenizer(weights)
    if own is None:
        return False
    content = own / "tokenizer.json"
    if content.is_file() and content.read_bytes() == tokenizer.files.get("tokenizer.json"):
        return True
    return Tokenizer.load(own).core.get_vocab() == tokenizer.core.get_vocab()
