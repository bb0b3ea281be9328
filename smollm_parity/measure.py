"""The process of one backend of the parity report: it measures the backend and writes its arrays to a folder.

    python -m smollm_parity.measure jax --weights PATH --job job.npz --out FOLDER [--device gpu]

Separate processes because torch and JAX in one process conflict over cuDNN on a GPU (jax#19004), and to free memory.
`job.py` starts them, `rungs.py` compares their arrays.
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
        if mutant := os.environ.get("SMOLLM_MUTANT"):  # for the test that sees the report fail
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
