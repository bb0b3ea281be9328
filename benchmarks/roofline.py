"""Estimates how long a recipe takes on 1 to 512 H100s. Nothing here was measured.

`python -m benchmarks.roofline` prints the tables of docs/scaling.md, which gives the sources of the speeds.
"""

import math
from collections.abc import Iterator

from smollm_jax.config import named_runs, preset
from smollm_jax.model.cost import count_parameters

MINIMUM, TARGET, CEILING = 215_000, 320_000, 775_000  # tokens/s of one H100 at T = 2,048: docs/performance.md
LONG = {MINIMUM: 0.45, TARGET: 0.52}  # of that at T = 8,192, its minimum and target in the same file
NVLINK, INFINIBAND = 450e9, 50e9  # bytes/s a GPU sends, and receives at the same time
MACHINE = 8  # GPUs that NVLink joins
LAYOUTS = ((1, 1), (8, 1), (64, 1), (8, 8), (512, 1), (64, 8))  # data, fsdp


def communication_seconds(data: int, fsdp: int, nbytes: float) -> float:
    """Seconds a step spends on ring collectives: parameters gathered over `fsdp`, gradients reduced.

    In a ring of n devices each sends (n - 1) / n of the bytes for an all-gather or reduce-scatter and twice that for an
    all-reduce, at the speed of the slowest link. `fsdp` joins mesh neighbours, so that up to 8 stay within a machine.
    """
    within = NVLINK if fsdp <= MACHINE else INFINIBAND
    between = NVLINK if data * fsdp <= MACHINE else INFINIBAND
    return 2 * (fsdp - 1) / fsdp * nbytes / within + 2 * (data - 1) / data * nbytes / fsdp / between


def seconds(tokens: float, tokens_per_second: float, layout: tuple[int, int], nbytes: float) -> float:
    """Seconds of a step of `tokens` over all devices, if communication does not overlap computation."""
    return tokens / math.prod(layout) / tokens_per_second + communication_seconds(*layout, nbytes)


def mesh_name(data: int, fsdp: int) -> str:
    """The mesh in the form of `--mesh`, without axes of size 1."""
    return ",".join(f"{name}={size}" for name, size in (("data", data), ("fsdp", fsdp)) if size > 1) or "data=1"


def tables() -> Iterator[str]:
    """The lines of docs/scaling.md's three tables."""
    real = named_runs.by_name("smollm2-135m")
    recipe, nbytes = real.resolve({}), 4 * count_parameters(preset(real.preset))
    speeds = (MINIMUM, TARGET, CEILING)
    heads = " | ".join(f"at {speed:,} tokens/s" for speed in speeds)
    yield f"| GPUs | mesh | sending, ms a step | {heads} |"
    yield "|---:|---|---:|---:|---:|---:|"
    for layout in LAYOUTS[1:]:
        sending = communication_seconds(*layout, nbytes)
        tokens = " | ".join(f"{9 * sending * speed:,.0f}" for speed in speeds)
        yield f"| {math.prod(layout)} | `{mesh_name(*layout)}` | {1e3 * sending:.1f} | {tokens} |"
    yield ""
    yield "| tokens/s a GPU | GPUs | mesh | tokens a GPU | sending | billion tokens a day | days | GPU-hours |"
    yield "|---:|---:|---|---:|---:|---:|---:|---:|"
    for speed in speeds:
        for layout in LAYOUTS:
            devices = math.prod(layout)
            step = seconds(recipe.tokens_per_step, speed, layout, nbytes)
            share = communication_seconds(*layout, nbytes) / step
            daily, days = 86_400 / step * recipe.tokens_per_step / 1e9, recipe.steps * step / 86_400
            tokens = recipe.tokens_per_step // devices
            yield (
                f"| {speed:,} | {devices} | `{mesh_name(*layout)}` | {tokens:,} | {share:.0%} "
                f"| {daily:,.0f} | {days:,.2f} | {24 * days * devices:,.0f} |"
            )
    yield ""
    yield "| recipe | tokens | hours of one GPU at the minimum | at the target |"
    yield "|---|---:|---:|---:|"
    for name in ("one-gpu-day", "smollm2-135m", "smollm2-135m-long"):
        run = named_runs.by_name(name).resolve({})
        tokens = run.steps * run.tokens_per_step
        rates = [speed * (LONG[speed] if run.sequence_length == 8192 else 1) for speed in (MINIMUM, TARGET)]
        hours = " | ".join(f"{tokens / rate / 3600:,.1f}" for rate in rates)
        yield f"| `{name}` | {tokens:,} | {hours} |"


if __name__ == "__main__":
    print("\n".join(tables()))
