"""Estimate the memory per device that a training step needs, for each remat policy.

    python scripts/plan_memory.py --batch-size 8 --sequence-length 2048
    python scripts/plan_memory.py --platform gpu --dtype bfloat16 --memory 80 --mesh data=4,fsdp=2 --batch-size 256
    python scripts/plan_memory.py --sequence-length 1024 --check    # compiles each step and compares with XLA's figure
    python scripts/plan_memory.py --lora-rank 16 --batch-size 2 --sequence-length 512    # finetune.py, an adapter

Takes train_jax.py's flags. Allocates nothing, and compiles only with --check, so it also works for devices that this
machine does not have. The estimate for a GPU is within 8 % of the program that scripts/compile_for_gpu.py compiles for
an H100, plus an allowance for cuDNN's workspace, which that program lacks.
"""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any, Literal, get_args

from smollm_jax import errors
from smollm_jax.commands import command_line


@dataclasses.dataclass(frozen=True)
class Flags:
    preset: str = "smollm2-135m"
    """Model shape."""
    batch_size: int = 8
    """Sequences per step, over all devices."""
    sequence_length: int = 2048
    """Tokens per sequence."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Dtype of matmuls."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per step."""
    lora_rank: int = 0
    """Plan a step of finetune.py that trains a LoRA adapter of this rank. Default: all parameters are trained."""
    lora_targets: str = "all-linear"
    """The projections that get an adapter, as in finetune.py."""
    mesh: str | None = None
    """Device mesh, as in train_jax.py. Default: one device."""
    attention: Literal["xla", "cudnn"] | None = None
    """Attention implementation. Default: cudnn on a GPU in bfloat16, else xla."""
    platform: Literal["cpu", "gpu"] | None = None
    """Platform of the devices. Default: that of this machine."""
    memory: float | None = None
    """GB per device. Default: those of this machine."""
    check: bool = False
    """Compile each step, on virtual devices if there is no GPU, and show the memory that XLA says it needs."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


GROUPS = {
    "model": ("preset", "attention", "dtype"),
    "batch": ("batch_size", "sequence_length", "gradient_accumulation_steps"),
    "LoRA": ("lora_rank", "lora_targets"),
    "devices": ("mesh", "platform", "memory"),
    "other": ("check", "debug"),
}


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__)
    if flags.sequence_length < 1 or not 0 < (flags.memory or 1) < math.inf:
        raise errors.UsageError("--sequence-length and --memory must be positive")
    import jax

    from smollm_jax.config import Recipe, preset
    from smollm_jax.config.finetune_recipe import FinetuneRecipe
    from smollm_jax.config.recipe import Remat, check_batch_divides
    from smollm_jax.finetuning import lora
    from smollm_jax.finetuning.objectives import LearntTokens
    from smollm_jax.model import precision
    from smollm_jax.parallel import sharding
    from smollm_jax.training import memory, train_step
    from smollm_jax.training.execution import ExecutionConfig, fastest_attention

    config, accumulation_steps = preset(flags.preset), flags.gradient_accumulation_steps
    if flags.sequence_length > config.max_position_embeddings:
        length = f"--sequence-length {flags.sequence_length}"
        raise errors.UsageError(f"{length} exceeds the model's {config.max_position_embeddings} positions")
    sizes = sharding.parse_mesh(flags.mesh or "data=1")
    devices = math.prod(sizes.values())
    check_batch_divides(flags.batch_size, devices, accumulation_steps)
    jax.config.update("jax_num_cpu_devices", devices)
    local_platform = jax.devices()[0].platform
    platform = flags.platform or local_platform
    if platform != local_platform and (flags.check or flags.memory is None):
        raise errors.UsageError(f"--platform {platform}: this machine has none: add --memory, and leave out --check")
    device = SimpleNamespace(platform=platform, compute_capability="8.0")  # as a GPU one with cuDNN attention
    documents = flags.lora_rank > 0  # the examples of a row do not see each other
    fastest, _ = fastest_attention(device, flags.dtype, flags.sequence_length, config.head_dim, documents=documents)
    attention: Any = flags.attention or fastest
    mesh: Any = None
    if flags.mesh:  # estimates need only an abstract mesh
        mesh = (
            sharding.make_mesh(flags.mesh) if flags.check else jax.sharding.AbstractMesh((*sizes.values(),), (*sizes,))
        )
    if flags.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "float32")
    limit = int(flags.memory * 1e9) if flags.memory else memory.device_limit(jax.devices()[0], devices)
    if not limit:
        raise errors.UsageError(f"JAX does not say how much memory {jax.devices()[0].device_kind} has: give --memory")
    fields: dict[str, Any] = {
        "steps": 1000,
        "batch_size": flags.batch_size,
        "sequence_length": flags.sequence_length,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "dtype": flags.dtype,
        "gradient_accumulation_steps": accumulation_steps,
    }
    recipe, separator_id, options = Recipe(**fields), None, {}
    if flags.lora_rank:
        separator_id = 0  # any id, of documents
        recipe = FinetuneRecipe(**fields, lora_rank=flags.lora_rank, lora_alpha=1.0, lora_targets=flags.lora_targets)
        options = lora.compile_options(config, recipe) | {"objective": lora.Adapted(LearntTokens(), 1.0)}
        rows = jax.ShapeDtypeStruct((flags.batch_size, flags.sequence_length), "int32")
        options["batch"] = dict.fromkeys(("tokens", "targets", "documents"), rows)
    size = f"{recipe.batch_size} x {recipe.sequence_length} tokens of {flags.preset} in {flags.dtype}"
    if flags.lora_rank:
        size += f", an adapter of rank {flags.lora_rank} on {flags.lora_targets} trained"
    print(f"{size}, attention {attention}, on {flags.mesh or 'one device'}, {platform}, {limit / 1e9:.1f} GB each\n")
    names = [field.name for field in dataclasses.fields(memory.MemoryEstimate)]
    columns: dict[str, list[str]] = {}
    for remat in get_args(Remat):
        dtype, operands = precision.activation_and_operand_dtypes(flags.dtype, platform)
        execution = ExecutionConfig(dtype, attention, remat, 1, accumulation_steps, mesh, separator_id, operands)
        estimate = memory.estimate(config, recipe, execution, platform)
        cells = [f"{getattr(estimate, name) / 1e9:.3f}" for name in names]
        try:
            largest = str(memory.largest_batch(config, recipe, execution, platform, limit).batch_size)
        except errors.UsageError:
            largest = "none"
        cells += [f"**{estimate.total / 1e9:.3f}**", "yes" if estimate.total <= limit else "no", largest]
        if flags.check:
            compiled = memory.compiled_bytes(train_step.compile_step(config, recipe, execution, **options))
            cells += [f"{compiled / 1e9:.3f}", f"{estimate.total / compiled - 1:+.1%}"]
        columns[remat] = cells
    rows = [*names, "**peak**", "fits", "--batch-size auto"] + ["XLA's figure", "estimate against it"] * flags.check
    print(f"| GB per device, --remat | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, *cells in zip(rows, *columns.values(), strict=False):
        print(f"| {name} | {' | '.join(cells)} |")
