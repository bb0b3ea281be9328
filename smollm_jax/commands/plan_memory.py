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
from typing import TYPE_CHECKING, Any, Literal, get_args

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.config.recipe import Remat

if TYPE_CHECKING:
    from smollm_jax.config import Config, Recipe
    from smollm_jax.config.finetune_recipe import FinetuneRecipe


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


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """A training step, all but how much of a layer it keeps for the backward pass."""

    config: "Config"
    recipe: "Recipe | FinetuneRecipe"
    attention: Any
    platform: str
    mesh: Any  # of `jax.sharding`; an abstract one is enough for an estimate
    separator_id: int | None
    compile_options: dict[str, Any]  # of `train_step.compile_step`

    def column(self, remat: Remat, limit: int, *, check: bool) -> dict[str, str]:
        """The table's column for a remat policy: GB of each term, then what fits in `limit` bytes."""
        from smollm_jax.model import precision
        from smollm_jax.training import memory, train_step
        from smollm_jax.training.execution import ExecutionConfig

        config, recipe, platform, mesh = self.config, self.recipe, self.platform, self.mesh
        dtype, operands = precision.activation_and_operand_dtypes(recipe.dtype, platform)
        steps = recipe.gradient_accumulation_steps
        execution = ExecutionConfig(dtype, self.attention, remat, 1, steps, mesh, self.separator_id, operands)
        estimate = memory.estimate(config, recipe, execution, platform)
        cells = {name: f"{value / 1e9:.3f}" for name, value in dataclasses.asdict(estimate).items()}
        cells |= {"**peak**": f"**{estimate.total / 1e9:.3f}**", "fits": "yes" if estimate.total <= limit else "no"}
        try:
            cells["--batch-size auto"] = str(
                memory.largest_batch(config, recipe, execution, platform, limit).batch_size
            )
        except errors.UsageError:
            cells["--batch-size auto"] = "none"
        if check:
            compiled = memory.compiled_bytes(train_step.compile_step(config, recipe, execution, **self.compile_options))
            cells |= {"XLA's figure": f"{compiled / 1e9:.3f}"}
            cells |= {"estimate against it": f"{estimate.total / compiled - 1:+.1%}"}
        return cells


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__)
    if flags.sequence_length < 1 or not 0 < (flags.memory or 1) < math.inf:
        raise errors.UsageError("--sequence-length and --memory must be positive")
    step, limit = plan(flags)
    size = f"{flags.batch_size} x {flags.sequence_length} tokens of {flags.preset} in {flags.dtype}"
    if flags.lora_rank:
        size += f", an adapter of rank {flags.lora_rank} on {flags.lora_targets} trained"
    devices = flags.mesh or "one device"
    print(f"{size}, attention {step.attention}, on {devices}, {step.platform}, {limit / 1e9:.1f} GB each\n")
    columns = {remat: step.column(remat, limit, check=flags.check) for remat in get_args(Remat)}
    print(f"| GB per device, --remat | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name in columns["none"]:
        print(f"| {name} | {' | '.join(column[name] for column in columns.values())} |")


def plan(flags: Flags) -> tuple[PlannedStep, int]:
    """The step that the flags describe, and the bytes of memory of a device; raises `UsageError` for a bad flag."""
    import jax

    from smollm_jax.config import preset
    from smollm_jax.training.execution import fastest_attention

    config = preset(flags.preset)
    if flags.sequence_length > config.max_position_embeddings:
        length = f"--sequence-length {flags.sequence_length}"
        raise errors.UsageError(f"{length} exceeds the model's {config.max_position_embeddings} positions")
    platform, mesh, limit = _devices(flags)
    device = SimpleNamespace(platform=platform, compute_capability="8.0")  # as a GPU one with cuDNN attention
    documents = flags.lora_rank > 0  # the examples of a row do not see each other
    fastest, _ = fastest_attention(device, flags.dtype, flags.sequence_length, config.head_dim, documents=documents)
    if flags.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "float32")
    recipe, options = _recipe(flags, config)
    separator_id = 0 if documents else None  # any id
    return PlannedStep(config, recipe, flags.attention or fastest, platform, mesh, separator_id, options), limit


def _devices(flags: Flags) -> tuple[str, Any, int]:
    """The platform, the mesh or None, and the bytes of memory of each device."""
    import jax

    from smollm_jax.config.recipe import check_batch_divides
    from smollm_jax.parallel import sharding
    from smollm_jax.training import memory

    sizes = sharding.parse_mesh(flags.mesh or "data=1")
    count = math.prod(sizes.values())
    check_batch_divides(flags.batch_size, count, flags.gradient_accumulation_steps)
    jax.config.update("jax_num_cpu_devices", count)
    device = jax.devices()[0]
    platform = flags.platform or device.platform
    if platform != device.platform and (flags.check or flags.memory is None):
        raise errors.UsageError(f"--platform {platform}: this machine has none: add --memory, and leave out --check")
    limit = int(flags.memory * 1e9) if flags.memory else memory.device_limit(device, count)
    if not limit:
        raise errors.UsageError(f"JAX does not say how much memory {device.device_kind} has: give --memory")
    if flags.mesh is None:
        return platform, None, limit
    if flags.check:
        return platform, sharding.make_mesh(flags.mesh), limit
    return platform, jax.sharding.AbstractMesh((*sizes.values(),), (*sizes,)), limit


def _recipe(flags: Flags, config: "Config") -> tuple["Recipe | FinetuneRecipe", dict[str, Any]]:
    """The recipe, and what compiling its step takes more."""
    fields: dict[str, Any] = {
        "steps": 1000,
        "batch_size": flags.batch_size,
        "sequence_length": flags.sequence_length,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "dtype": flags.dtype,
        "gradient_accumulation_steps": flags.gradient_accumulation_steps,
    }
    if not flags.lora_rank:
        from smollm_jax.config import Recipe

        return Recipe(**fields), {}
    import jax

    from smollm_jax.config.finetune_recipe import FinetuneRecipe
    from smollm_jax.finetuning import lora
    from smollm_jax.finetuning.objectives import LearntTokens

    recipe = FinetuneRecipe(**fields, lora_rank=flags.lora_rank, lora_alpha=1.0, lora_targets=flags.lora_targets)
    rows = jax.ShapeDtypeStruct((flags.batch_size, flags.sequence_length), "int32")
    batch = dict.fromkeys(("tokens", "targets", "documents"), rows)
    objective = lora.Adapted(LearntTokens(), 1.0)
    return recipe, lora.compile_options(config, recipe) | {"objective": objective, "batch": batch}
