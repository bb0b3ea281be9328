"""The machine a measurement ran on, to a JSON file: its GPUs and driver, versions, and what JAX finds.

    python -m benchmarks.machine machine.json

The file is there even where JAX does not start; that is then the exit status. A stage of `scripts/gpu_first.sh`.
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
    names = {each.metadata["Name"]: each.version for each in metadata.distributions()}
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "nvidia_smi": nvidia_smi(),
        "versions": {name: names[name] for name in sorted(names) if PACKAGES.match(name)},
    }
    write(out, found)
    import jax

    device = jax.devices()[0]
    found["device"] = device.device_kind
    found["platform_version"] = device.client.platform_version  # CUDA's too
    found["compute_capability"] = getattr(device, "compute_capability", None)
    found["memory_stats"] = device.memory_stats()  # None under some allocators
    write(out, found)


def write(out: Path, found: dict[str, Any]) -> None:
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found), flush=True)


def nvidia_smi() -> list[str]:
    """A line a GPU, after one that names the columns; what went wrong, where there is none."""
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
