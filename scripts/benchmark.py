"""Measure what something costs, both sides in turn in one run, medians with their spread.

    python scripts/benchmark.py checkpoint                    # what the manifest, and the guard in the step, cost
    python scripts/benchmark.py checkpoint --preset tiny --rounds 2

Prints a table and writes it, with versions and the command, to benchmarks/<what>-<device>-<date>.json. Only ratios of
one run mean anything: machines are shared, and their speed changes from minute to minute.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from smollm_jax import errors


@dataclasses.dataclass(frozen=True)
class Flags:
    what: tyro.conf.Positional[Literal["checkpoint"]]
    """checkpoint: saving, verifying and restoring a training state, and the step's check for finite numbers."""
    preset: str = "smollm2-135m-pretrain"
    """Model, with seeded random weights."""
    rounds: int = 7
    """Times each side is measured, after one that is not counted."""
    batch_size: int = 1
    """Sequences a step."""
    sequence_length: int = 256
    """Tokens a sequence."""
    out: Path | None = None
    """JSON file to write."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


def main(argv: list[str] | None = None) -> None:
    flags = tyro.cli(Flags, args=argv, description=__doc__)
    import jax

    from smollm_jax.provenance import environment

    if flags.rounds < 1:
        raise errors.UsageError(f"--rounds must be at least 1, got {flags.rounds}")
    rows = {"checkpoint": checkpoint}[flags.what](flags)
    device = jax.devices()[0]
    for name, row in rows.items():
        values = [f"{what} {value:.4g}" for what, value in row.items()]
        print(f"{name:44} {'  '.join(values)}")
    name = f"{flags.what}-{device.device_kind.lower().replace(' ', '-')}-{time.strftime('%Y-%m-%d')}.json"
    out = flags.out or Path("benchmarks") / name
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": f"python scripts/benchmark.py {' '.join(argv if argv is not None else sys.argv[1:])}",
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(device.device_kind, jax.device_count()),
        "rows": rows,
    }
    out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {out}")


def alternate(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds each side took in each round, the sides in turn; the first round, which compiles, is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - began)
    return {name: times[1:] for name, times in seconds.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def checkpoint(flags: Flags) -> dict[str, dict[str, float]]:
    """What the manifest adds to a save and to a restore, and the check for finite numbers to a step."""
    import functools

    import jax
    import numpy as np
    import optax

    from smollm_jax import integrity, optimizer, train
    from smollm_jax.checkpoint import CheckpointStore, flatten
    from smollm_jax.config import preset
    from smollm_jax.recipe import Recipe

    config = preset(flags.preset)
    recipe = Recipe(
        steps=1000,
        batch_size=flags.batch_size,
        sequence_length=flags.sequence_length,
        learning_rate=1e-3,
        warmup_steps=0,
        dtype="float32",
    )
    tx, compute = optimizer.adamw(recipe), train.Compute("float32")
    tokens = jax.numpy.asarray(
        np.random.default_rng(0).integers(0, config.vocab_size, (flags.batch_size, flags.sequence_length + 1))
    )
    state = train.begin(train.fresh(config, 0), tx)

    @functools.partial(jax.jit, donate_argnums=0)
    def unguarded(state: train.TrainState) -> train.TrainState:
        gradients: Any
        _, gradients = train.mean_gradients(state.model, tokens, compute)
        model: Any = state.model
        updates, opt_state = tx.update(gradients, state.opt_state, model)
        return train.TrainState(optax.apply_updates(model, updates), opt_state)  # pyright: ignore[reportArgumentType]

    states = {"guarded": state, "unguarded": jax.tree.map(jax.numpy.copy, state)}

    def step(name: str) -> None:
        if name == "guarded":
            states[name], _ = train.train_step(states[name], tokens, tx=tx, compute=compute)
        else:
            states[name] = unguarded(states[name])
        jax.block_until_ready(states[name])

    del state
    seconds = alternate({name: functools.partial(step, name) for name in states}, flags.rounds)
    state = states.pop("guarded")  # moments that are no longer zero, which would compress to nothing

    items = {"params": flatten(state.model), "optimizer": flatten(state.opt_state)}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items)
    sealing, seal = [], integrity.seal

    def timed_seal(folder: Path, about: dict[str, Any]) -> None:
        began = time.perf_counter()
        seal(folder, about)
        sealing.append(time.perf_counter() - began)

    integrity.seal = timed_seal
    with tempfile.TemporaryDirectory(dir=".") as folder, CheckpointStore(Path(folder), keep=1) as store:
        sides = {
            "save": lambda: store.save(len(sealing) + 1, items, {}),
            "verify": lambda: store.verify(store.latest_step()),
            "restore": lambda: jax.block_until_ready(store.restore(store.latest_step(), like)),
        }
        seconds |= alternate(sides, flags.rounds)
    integrity.seal = seal

    ratios = {
        "manifest / save": np.divide(sealing[1:], seconds["save"]),
        "verify / save": np.divide(seconds["verify"], seconds["save"]),
        "step guarded / unguarded": np.divide(seconds["guarded"], seconds["unguarded"]),
    }
    rows = {f"{name}, seconds": spread(times) for name, times in {**seconds, "manifest": sealing[1:]}.items()}
    return rows | {name: spread([float(x) for x in ratio]) for name, ratio in ratios.items()}


if __name__ == "__main__":
    errors.run(main)
