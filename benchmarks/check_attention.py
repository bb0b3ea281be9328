"""Attention and its gradients on this device, against plain float32 attention on the CPU.

    python -m benchmarks.check_attention --out attention.json --sequence-length 2048

By XLA and, on a GPU in bfloat16, by cuDNN: causal, and packed documents against each document on its own. Prints and
writes each RMS error over the RMS of the truth; exit status 1 when one exceeds its bound. A stage of
`scripts/gpu_suite.sh`.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import tyro

from benchmarks.workload import Workload
from smollm_jax.runtime.program import run_main

# Measured on a CPU at T = 64 and 2,048: up to 1.1e-6 in float32 and 3.0e-3 in bfloat16, whose rounding is 4e-3.
BOUND = {"float32": 1e-5, "bfloat16": 2e-2}
CUDNN_OVER_XLA = 2.0  # both round to bfloat16; in which order is theirs


@dataclasses.dataclass(frozen=True)
class Flags:
    out: Path
    """JSON file to write."""
    preset: str = "smollm2-135m"
    """Shape of the heads."""
    sequence_length: int = 2048
    """Tokens a sequence."""
    document_tokens: int = 512
    """Mean length of a packed document."""


def main(argv: list[str] | None = None) -> None:
    flags = tyro.cli(Flags, args=argv, description=__doc__)
    platforms = os.environ.get("JAX_PLATFORMS", "")
    os.environ["JAX_PLATFORMS"] = "cpu" if platforms == "cpu" else "cuda,cpu"  # the truth's device too
    import jax
    import numpy as np

    from benchmarks.jax_backend import forward_and_backward
    from smollm_jax.model.attention import causal, packed
    from smollm_jax.training.execution import fastest_attention

    jax.config.update("jax_default_matmul_precision", "highest")
    cpu = jax.devices("cpu")[0]
    length, documents = flags.sequence_length, flags.document_tokens
    workload = Workload("attention", flags.preset, 1, 2, length, 2, documents, "float32", "none", 1)
    # Numbers of bfloat16, so that both dtypes compute from the same ones.
    inputs = [np.asarray(jax.numpy.asarray(x, "bfloat16"), np.float32) for x in workload.heads()]
    segments = workload.segments()

    def plain(q: Any, k: Any, v: Any, cache: Any) -> tuple[Any, Any]:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla"), cache

    alone_or_causal = forward_and_backward(plain)  # compiled once a length

    def on(device: Any, both: Any, arrays: list[np.ndarray], dtype: str) -> list[np.ndarray]:
        put = [jax.device_put(jax.numpy.asarray(x, dtype), device) for x in arrays]
        return [np.asarray(x, np.float32) for x in both(*put)]

    def alone() -> list[np.ndarray]:
        """Every document by itself, put together again."""
        whole = [np.zeros_like(inputs[i]) for i in (0, 0, 1, 2)]
        for row, numbers in enumerate(segments):
            for document in np.unique(numbers):
                (places,) = np.nonzero(numbers == document)
                part = slice(places[0], places[-1] + 1)
                for target, found in zip(
                    whole, on(cpu, alone_or_causal, [x[row : row + 1, part] for x in inputs], "float32"), strict=True
                ):
                    target[row, part] = found[0]
        return whole

    device, rows = jax.devices()[0], []
    truths = {"causal": on(cpu, alone_or_causal, inputs, "float32"), "packed": alone()}
    inside = packed(jax.device_put(jax.numpy.asarray(segments), device))
    runs = [("causal", "xla", causal("xla"), dtype) for dtype in BOUND]
    runs += [("packed", "xla", inside, dtype) for dtype in BOUND]
    by_cudnn = packed(jax.device_put(jax.numpy.asarray(segments), device), "cudnn")
    left_out: dict[str, str] = {}  # as the trainer does
    for what, attend in (("causal", causal("cudnn")), ("packed", by_cudnn)):
        _, needs = fastest_attention(device, "bfloat16", length, workload.config.head_dim, what == "packed")
        if needs:
            left_out[what] = f"not measured: cudnn {needs}"
            print(f"{what}: {left_out[what]}")
        else:
            runs.append((what, "cudnn", attend, "bfloat16"))
    worst: dict[tuple[str, str, str], float] = {}
    for what, by, attend, dtype in runs:
        found = on(device, forward_and_backward(attend), inputs, dtype)
        for name, mine, true in zip(("out", "d q", "d k", "d v"), found, truths[what], strict=True):
            error = float(np.sqrt(np.mean((mine - true) ** 2) / np.mean(true**2)))
            bound = BOUND[dtype]
            if by == "cudnn":
                bound = min(bound, CUDNN_OVER_XLA * worst[what, "xla", name])
            elif dtype == "bfloat16":
                worst[what, by, name] = error
            rows.append({"attention": what, "by": by, "dtype": dtype, "of": name, "error": error, "bound": bound})
    for row in rows:
        row["passed"] = bool(row["error"] <= row["bound"])  # a NaN fails
        print(f"{'pass' if row['passed'] else 'FAIL'}  {row}")
    content = {"device": device.device_kind, "rows": rows, "cudnn": left_out or "measured"}
    flags.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if not all(row["passed"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
