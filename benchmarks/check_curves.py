"""Compares the losses of two runs step by step.

    python -m benchmarks.check_curves runs/jax runs/torch --steps 20 --bound 0.02 --out curves.json

For a JAX run and the twin trained like it (`scripts/train_torch.py`). Exit status 1 when a difference exceeds the
bound, 3 when a step is missing. A stage of `scripts/gpu_suite.sh`.
"""

import dataclasses
import json
from pathlib import Path

import tyro

from smollm_jax import errors
from smollm_jax.runtime.program import run_main


@dataclasses.dataclass(frozen=True)
class Flags:
    run: tyro.conf.Positional[Path]
    """Run folder."""
    other: tyro.conf.Positional[Path]
    """Run folder to compare it with."""
    steps: int
    """Steps to compare; both runs must have them."""
    bound: float
    """Largest relative difference allowed between two losses of a step."""
    out: Path
    """JSON file to write."""


def main(argv: list[str] | None = None) -> None:
    flags = tyro.cli(Flags, args=argv, description=__doc__)
    curves = [losses(run)[: flags.steps] for run in (flags.run, flags.other)]
    for run, curve in zip((flags.run, flags.other), curves, strict=True):
        if len(curve) < flags.steps:
            raise errors.InputFileError(f"{run}/metrics.jsonl: has {len(curve)} steps, but --steps is {flags.steps}")
    differences = [abs(a - b) / abs(b) for a, b in zip(*curves, strict=True)]
    content = {
        "steps": flags.steps,
        "bound": flags.bound,
        "furthest": max(differences),
        "apart": differences,
        "losses": curves,
    }
    flags.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    passed = all(x <= flags.bound for x in differences)  # False for NaN
    verdict = "pass" if passed else "FAIL"
    print(f"{verdict}  {flags.steps} losses differ by at most {max(differences):.1e} (allowed: {flags.bound:g})")
    if not passed:
        raise SystemExit(1)


def losses(run: Path) -> list[float]:
    """The loss of every step in a run's metrics, in order."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


if __name__ == "__main__":
    run_main(main)
