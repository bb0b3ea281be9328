"""Where the time of a training step goes, by kind of work.

    python scripts/profile_train.py --sequence-length 2048                                    # CPU
    python scripts/profile_train.py --dtype bfloat16 --batch-size 16 --sequence-length 2048   # GPU

Runs a few steps with random weights and tokens under JAX's profiler and attributes their time to the instructions of
the compiled program, in equal shares where several run at once. On a CPU an instruction lasts from the start to the
end of its call; work of its threads after that counts as idle. On a GPU, traces do not name the instructions of kernels
inside command buffers (CUDA graphs; openxla/xprof#3070), so the script disables them unless XLA_FLAGS sets them; this
leaves more idle time between kernels than training has. The trace stays in --out, for Perfetto or XProf.
"""

import collections
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: `benchmarks` is in no wheel

from benchmarks.xla.hlo import Program, parse
from benchmarks.xla.profile import attribute_time, busy_intervals
from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.config.recipe import Remat
from smollm_jax.runtime.program import run_main


@dataclasses.dataclass(frozen=True)
class Flags:
    preset: str = "smollm2-135m"
    """Model, with seeded random weights."""
    batch_size: int = 1
    """Sequences per step."""
    sequence_length: int = 256
    """Tokens per sequence."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the matmuls."""
    remat: Remat | None = None
    """As in train_jax.py."""
    unroll: int | None = None
    """Layers unrolled per step of the layer scan; default: as in train_jax.py."""
    steps: int = 3
    """Steps to trace, after two warm-up steps."""
    instructions: int = 15
    """Number of instructions to list."""
    out: Path = Path("profiles")
    """Folder for the trace."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


NO_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__)
    for name in ("batch_size", "sequence_length", "unroll", "steps", "instructions"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise errors.UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    buffers = without_command_buffers()  # XLA reads its flags when JAX is first used
    import jax
    import numpy as np

    from smollm_jax.config import Recipe, preset
    from smollm_jax.model import precision
    from smollm_jax.runtime import compilation_cache
    from smollm_jax.training import memory, optimizer, train_step
    from smollm_jax.training.execution import ExecutionConfig, default_unroll, fastest_attention
    from smollm_jax.training.state import init_model, init_train_state

    compilation_cache.enable()
    device = jax.devices()[0]
    platform = device.platform
    config = preset(flags.preset)
    recipe = Recipe(
        1000, flags.batch_size, flags.sequence_length, learning_rate=1e-3, warmup_steps=0, dtype=flags.dtype
    )
    attention, _ = fastest_attention(device, flags.dtype, flags.sequence_length, config.head_dim, documents=False)
    unroll = default_unroll(config, attention) if flags.unroll is None else flags.unroll
    dtype, operands = precision.activation_and_operand_dtypes(flags.dtype, platform)
    execution = ExecutionConfig(dtype, attention, flags.remat or "dots", unroll, operands=operands)
    if flags.remat is None:
        execution = memory.choose_remat(config, recipe, execution, platform, memory.device_limit(device))
    print(f"device      {device.device_kind}, jax {jax.__version__}")
    if platform == "gpu":
        print(f"            {buffers}")
    print(f"step        {flags.batch_size} x {flags.sequence_length} tokens of {flags.preset}, {execution}", flush=True)
    step: Any = train_step.compile_step(config, recipe, execution)
    state = init_train_state(init_model(config, 0), optimizer.adamw(recipe))
    shape = (flags.batch_size, flags.sequence_length + 1)
    tokens = jax.device_put(np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32))
    for _ in range(2):
        state, _ = step(state, tokens)
    jax.block_until_ready(state)
    with jax.profiler.trace(str(flags.out)):
        for _ in range(flags.steps):
            state, _ = step(state, tokens)
        jax.block_until_ready(state)
    trace = max(flags.out.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    program = parse(step.as_text())
    seconds, wall = attribute_time(busy_intervals(jax.profiler.ProfileData.from_file(str(trace)), program))
    if not seconds:
        raise errors.SmolLMError(f"{trace}: no event of the trace names an instruction of the step")
    print_tables(flags, program, seconds, wall)
    print(f"\ntrace: {trace}", file=sys.stderr)


def print_tables(flags: Flags, program: Program, seconds: collections.Counter[str], wall: float) -> None:
    """Prints milliseconds per step by kind of work, which add up to the step, and those of the longest instructions."""
    instructions = program.instructions
    kinds: collections.Counter[str] = collections.Counter()
    for name, spent in seconds.items():
        kinds[program.kind(instructions[name]) if name in instructions else name] += spent
    print("\n| kind of work | ms a step | share |\n|---|---:|---:|")
    for kind, spent in kinds.most_common():
        print(f"| {kind} | {spent / flags.steps * 1e3:.1f} | {spent / wall:.1%} |")
    print(f"| **step** | {wall / flags.steps * 1e3:.1f} | |")
    print("\n| instruction | kind | ms a step | from |\n|---|---|---:|---|")
    longest = [(name, spent) for name, spent in seconds.most_common() if name in instructions][: flags.instructions]
    for name, spent in longest:
        each = instructions[name]
        print(f"| {name} | {program.kind(each)} | {spent / flags.steps * 1e3:.1f} | {each.origin[-70:]} |")


def without_command_buffers() -> str:
    """Disables command buffers in XLA_FLAGS unless the user has set them; returns a line that says so."""
    given = os.environ.get("XLA_FLAGS", "")
    if NO_COMMAND_BUFFERS in given:
        return f"command buffers as set in XLA_FLAGS={given}; kernels inside one have no name"
    os.environ["XLA_FLAGS"] = f"{given} {NO_COMMAND_BUFFERS}".strip()
    return f"command buffers disabled, so that every kernel has a name: XLA_FLAGS={NO_COMMAND_BUFFERS}"


if __name__ == "__main__":
    run_main(main)
