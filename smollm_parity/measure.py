"""One backend of the ladder on any weights, measured in a process of its own and left as arrays in a folder.

    python -m smollm_parity.measure jax --weights PATH --job job.npz --out FOLDER [--device gpu]

Torch and JAX in one process fight over cuDNN on a GPU (jax#19004); apart, they also do not share their memory.
`job.py` starts the processes, and `rungs.py` compares what they leave.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np

BACKENDS = ("jax", "twin", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one backend of the parity ladder.")
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    flags = parser.parse_args()
    with np.load(flags.job) as file:
        job = dict(file)
    flags.out.mkdir(parents=True)
    if flags.backend == "jax":
        if mutant := os.environ.get("SMOLLM_MUTANT"):  # so that a test can see the report fail
            from smollm_parity import mutants

            mutants.apply(mutant)
        from smollm_parity.jax_backend import measure_jax

        versions = measure_jax(flags.weights, job, flags.out, flags.device)
    else:
        from smollm_parity.torch_backend import measure_torch

        versions = measure_torch(flags.backend, flags.weights, job, flags.out, flags.device)
    (flags.out / "versions.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    main()
