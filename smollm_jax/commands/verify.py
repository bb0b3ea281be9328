"""Check every file of a run's checkpoints against the sizes and hashes stored with it.

    python scripts/verify_checkpoint.py runs/my-run

Prints for each step "verified", or which file is wrong and how. Exits with status 4 if a checkpoint is bad or there is
none. Reads all files (about 1.5 GB per step for 135M parameters), changes nothing, and can run while the run trains.
"""

import dataclasses
from pathlib import Path

import tyro

from smollm_jax import errors
from smollm_jax.commands import command_line


@dataclasses.dataclass(frozen=True)
class Flags:
    run: tyro.conf.Positional[Path]
    """Run folder."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__)
    from smollm_jax.runs import manifest
    from smollm_jax.runs.checkpoint import steps_in

    folder = flags.run / "checkpoints"
    if not folder.is_dir():
        raise errors.CheckpointError(f"{folder}: no such checkpoint folder")
    steps, bad_count = steps_in(folder), 0
    for step in steps:
        try:
            content = manifest.verify(folder / str(step))
        except (errors.CheckpointError, errors.StorageError) as error:
            if step not in steps_in(folder):
                print(f"step {step}: removed by the trainer during the check")
                continue
            bad_count += 1
            print(f"step {step}: BAD: {error}")
            continue
        files, environment = content["files"], content.get("environment", {})
        size = sum(size for size, _ in files.values()) / 1e6
        names = [f"{name} {environment[name]}" for name in ("jax", "device", "cores") if name in environment]
        saved_with = f", saved with {', '.join(names)}" if names else ""
        print(f"step {step}: verified, {len(files)} files, {size:,.1f} MB{saved_with}")
    for renamed in sorted(path for path in folder.glob("*.bad*") if not manifest.is_stray(path.name)):
        print(f"{renamed}: a damaged checkpoint that --resume renamed")
    if not steps:
        raise errors.CheckpointError(f"{folder}: holds no checkpoint")
    if bad_count:
        raise errors.CheckpointError(f"{folder}: {bad_count} of {len(steps)} checkpoints are bad")
