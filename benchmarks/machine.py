"""Writes a description of this machine to a JSON file: GPUs and driver, package versions, JAX's device.

    python -m benchmarks.machine machine.json

The file is written even if JAX does not start; the exit status then says so. A stage of `scripts/gpu_first.sh`.
"""

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = re.compile(r"jax|flax|optax|orbax|torch$|transformers$|triton$|numpy$|tyro$|gguf$|nvidia-(cu|nccl)")
QUERY = "name,driver_version,memory.total,memory.used,power.limit,clocks.sm,clocks.max.sm,temperature.gpu"


def main(out: Path) -> None:
    installed = {each.metadata["Name"]: each.version for each in metadata.distributions()}
    description: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "nvidia_smi": nvidia_smi(),
        "versions": {name: installed[name] for name in sorted(installed) if PACKAGES.match(name)},
    }
    write(out, description)
    import jax

    device = jax.devices()[0]
    description["device"] = device.device_kind
    description["platform_version"] = device.client.platform_version  # CUDA's too
    description["compute_capability"] = getattr(device, "compute_capability", None)
    description["memory_stats"] = device.memory_stats()  # None under some allocators
    write(out, description)


def write(out: Path, description: dict[str, Any]) -> None:
    out.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(description), flush=True)


def nvidia_smi() -> list[str]:
    """nvidia-smi's CSV, one line per GPU after the header; its error where there is none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [str(error)]
    return done.stdout.splitlines()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
