"""Check every checkpoint of a run, file by file, against what was written.

    python scripts/verify_checkpoint.py runs/my-run

Prints each step: verified, or which file is wrong and how. Exit status 4 unless all are verified and there is one.
Reads all files (about 1.5 GB a step for 135M parameters), changes nothing, and may run beside the trainer.
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
    steps, bad = steps_in(folder), 0
    for step in steps:
        try:
            content = manifest.verify(folder / str(step))
        except (errors.CheckpointError, errors.StorageError) as error:
            if step not in steps_in(folder):
                print(f"step {step}: removed by the trainer meanwhile")
                continue
            bad += 1
            print(f"step {step}: BAD: {error}")
            continue
        files, where = content["files"], content["environment"]
        size = sum(size for size, _ in files.values()) / 1e6
        told = ", ".join(f"{name} {where[name]}" for name in ("jax", "device", "cores") if name in where)
        print(f"step {step}: verified, {len(files)} files, {size:,.1f} MB{', saved with ' if told else ''}{told}")
    for aside in sorted(path for path in folder.glob("*.bad*") if not manifest.is_stray(path.name)):
        print(f"{aside}: set aside by a resume")
    if bad or not steps:
        raise errors.CheckpointError(f"{folder}: {bad} of {len(steps)} checkpoints are bad")
