"""Where the time of a training step goes, by kind of work.

    python scripts/profile_train.py --sequence-length 2048                                    # CPU
    python scripts/profile_train.py --dtype bfloat16 --batch-size 16 --sequence-length 2048   # GPU

Runs some steps of seeded random weights and tokens under JAX's profiler, gives each moment to the instructions of the
compiled program that were at work in it (in equal parts when several were), and adds them up. On a CPU an instruction
counts from the start to the end of its call; what its threads do after that shows as idle. On a GPU kernels inside
command buffers (CUDA graphs) carry no instruction's name in a trace (openxla/xprof#3070), so none are made unless
XLA_FLAGS says something about them; that leaves more idle between kernels than a training has. The trace itself stays
in --out, for Perfetto or XProf.
"""

import collections
import dataclasses
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from smollm_jax import command_line, errors


@dataclasses.dataclass(frozen=True)
class Flags:
    preset: str = "smollm2-135m"
    """Model, with seeded random weights."""
    batch_size: int = 1
    """Sequences a step."""
    sequence_length: int = 256
    """Tokens a sequence."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the products."""
    remat: Literal["none", "swiglu", "dots", "full"] | None = None
    """As in train_jax.py."""
    unroll: int | None = None
    """Layers laid out per step of the layer scan; default: as in train_jax.py."""
    steps: int = 3
    """Steps to trace, after two that are not."""
    instructions: int = 15
    """How many single instructions to list."""
    out: Path = Path("profiles")
    """Folder for the trace."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


# The scopes named in train_step.py, loss.py and model.py; what is in none of them is a layer's.
SCOPES = {"optimizer": "optimizer", "loss": "head and loss", "attention": "attention"}
NO_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="
CONTAINERS = {"while", "conditional", "call", "async-start", "async-done"}
Interval = tuple[float, float, str]  # nanoseconds, nanoseconds, instruction


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__)
    for name in ("batch_size", "sequence_length", "unroll", "steps", "instructions"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise errors.UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    buffers = without_command_buffers()  # XLA reads its flags when JAX is first used
    import jax
    import numpy as np

    from smollm_jax import compilation_cache, memory, optimizer, precision, train_step
    from smollm_jax.attention import beyond_cudnn, lacks_cudnn
    from smollm_jax.config import preset
    from smollm_jax.recipe import Recipe

    compilation_cache.enable()
    device = jax.devices()[0]
    platform = device.platform
    config = preset(flags.preset)
    recipe = Recipe(
        1000, flags.batch_size, flags.sequence_length, learning_rate=1e-3, warmup_steps=0, dtype=flags.dtype
    )
    beyond = lacks_cudnn(device, flags.dtype) or beyond_cudnn(flags.sequence_length, config.head_dim, documents=False)
    attention: Any = "xla" if beyond else "cudnn"
    unroll = train_step.layers_at_once(config, attention) if flags.unroll is None else flags.unroll
    dtype, operands = precision.activations_and_operands(flags.dtype, platform)
    compute = train_step.Compute(dtype, attention, flags.remat or "dots", unroll, operands=operands)
    if flags.remat is None:
        compute = memory.fastest(config, recipe, compute, platform, memory.available(device))
    print(f"device      {device.device_kind}, jax {jax.__version__}")
    if platform == "gpu":
        print(f"            {buffers}")
    print(f"step        {flags.batch_size} x {flags.sequence_length} tokens of {flags.preset}, {compute}", flush=True)
    step: Any = train_step.compile_step(config, recipe, compute)
    state = train_step.begin(train_step.fresh(config, 0), optimizer.adamw(recipe))
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
    program = instructions(step.as_text())
    seconds, wall = shares(at_work(jax.profiler.ProfileData.from_file(str(trace)), program))
    if not seconds:
        raise errors.SmolLMError(f"{trace}: the trace names no instruction of the step")
    kinds: collections.Counter[str] = collections.Counter()
    for name, spent in seconds.items():
        kinds[program[name].kind if name in program else name] += spent
    print("\n| kind of work | ms a step | share |\n|---|---:|---:|")
    for kind, spent in kinds.most_common():
        print(f"| {kind} | {spent / flags.steps * 1e3:.1f} | {spent / wall:.1%} |")
    print(f"| **step** | {wall / flags.steps * 1e3:.1f} | |")
    print("\n| instruction | kind | ms a step | from |\n|---|---|---:|---|")
    singles = [(name, spent) for name, spent in seconds.most_common() if name in program][: flags.instructions]
    for name, spent in singles:
        print(f"| {name} | {program[name].kind} | {spent / flags.steps * 1e3:.1f} | {program[name].origin[-70:]} |")
    print(f"\ntrace: {trace}", file=sys.stderr)


def without_command_buffers() -> str:
    """Has XLA make no command buffers, unless the user's XLA_FLAGS name them already; says which, in words."""
    given = os.environ.get("XLA_FLAGS", "")
    if NO_COMMAND_BUFFERS in given:
        return f"command buffers as XLA_FLAGS says; kernels inside one have no name: {given}"
    os.environ["XLA_FLAGS"] = f"{given} {NO_COMMAND_BUFFERS}".strip()
    return f"no command buffers, so that every kernel has a name: XLA_FLAGS={NO_COMMAND_BUFFERS}"


@dataclasses.dataclass(frozen=True)
class Instruction:
    opcode: str
    kind: str
    origin: str  # jax's name for what it computes


def instructions(text: str) -> dict[str, Instruction]:
    """The instructions of a compiled program by name, each with its kind of work."""
    computations: dict[str, str] = {}
    for block in re.split(r"\n(?=\S)", text):
        computations[block.removeprefix("ENTRY ").split(" ")[0].lstrip("%")] = block
    found = {}
    for name, opcode, rest in re.findall(r"^ +(?:ROOT )?%?([\w.-]+) = .*? ([\w-]+)\((.*)$", text, re.MULTILINE):
        origin = match[1] if (match := re.search(r'op_name="([^"]*)"', rest)) else ""
        called = computations.get(match[1], "") if (match := re.search(r"calls=%?([\w.-]+)", rest)) else ""
        scope = next((kind for word, kind in SCOPES.items() if re.search(rf"\b{word}\b", origin)), None)
        product = opcode == "dot" or " dot(" in called or re.search(r'custom_call_target="[^"]*(gemm|matmul)', rest)
        found[name] = Instruction(opcode, scope or ("matrix products" if product else "elementwise"), origin)
    return found


def at_work(profile: Any, program: dict[str, Instruction]) -> Iterator[Interval]:
    """When each instruction was at work: on a GPU its kernels, on a CPU the calls."""
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in devices or [plane for plane in planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            for event in line.events:
                name = str(dict(event.stats).get("hlo_op", ""))
                if name in program and program[name].opcode not in CONTAINERS:
                    yield event.start_ns, event.start_ns + event.duration_ns, name


def shares(intervals: Iterable[Interval]) -> tuple[collections.Counter[str], float]:
    """Seconds of each instruction, and "idle", that add up to the whole; and the whole."""
    moments = sorted(moment for begin, end, name in intervals for moment in ((begin, 1, name), (end, -1, name)))
    seconds: Any = collections.Counter()
    active: collections.Counter[str] = collections.Counter()
    for (now, change, name), (then, _, _) in itertools.pairwise(moments):
        active[name] += change
        active += collections.Counter()  # drops what has ended
        for each, count in (active or {"idle": 1}).items():
            seconds[each] += (then - now) / 1e9 * count / (active.total() or 1)
    return seconds, sum(seconds.values())


if __name__ == "__main__":
    errors.run(main)
