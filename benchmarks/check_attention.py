"""Checks attention and its gradients on this device against plain float32 attention on the CPU.

    python -m benchmarks.check_attention --out attention.json --sequence-length 2048

Covers XLA and, on a GPU in bfloat16, cuDNN; causal attention, and packed documents against each document alone. Prints
and writes each RMS error relative to the RMS of the reference; exit status 1 when one exceeds its bound. A stage of
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
CUDNN_OVER_XLA = 2.0  # both round to bfloat16, in different places


@dataclasses.dataclass(frozen=True)
class Flags:
    out: Path
    """JSON file to write."""
    preset: str = "smollm2-135m"
    """Model whose heads' shape is used."""
    sequence_length: int = 2048
    """Tokens per sequence."""
    document_tokens: int = 512
    """Mean length of a packed document."""


def main(argv: list[str] | None = None) -> None:
    flags = tyro.cli(Flags, args=argv, description=__doc__)
    platforms = os.environ.get("JAX_PLATFORMS", "")
    os.environ["JAX_PLATFORMS"] = "cpu" if platforms == "cpu" else "cuda,cpu"  # the reference runs on the CPU
    import jax
    import numpy as np

    from benchmarks.jax_backend import forward_and_backward
    from smollm_jax.model.attention import causal, packed
    from smollm_jax.training.execution import fastest_attention

    jax.config.update("jax_default_matmul_precision", "highest")
    cpu = jax.devices("cpu")[0]
    length, documents = flags.sequence_length, flags.document_tokens
    workload = Workload("attention", flags.preset, 1, 2, length, 2, documents, "float32", "none", 1)
    # Rounded to bfloat16, so that both dtypes compute from the same numbers.
    inputs = [np.asarray(jax.numpy.asarray(x, "bfloat16"), np.float32) for x in workload.heads()]
    segments = workload.segments()

    def plain_attention(q: Any, k: Any, v: Any, cache: Any) -> tuple[Any, Any]:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla"), cache

    reference = forward_and_backward(plain_attention)  # compiled once per length

    def run_on(device: Any, function: Any, arrays: list[np.ndarray], dtype: str) -> list[np.ndarray]:
        put = [jax.device_put(jax.numpy.asarray(x, dtype), device) for x in arrays]
        return [np.asarray(x, np.float32) for x in function(*put)]

    def documents_separately() -> list[np.ndarray]:
        """The results of every document alone, at its positions of the packed rows."""
        packed_rows = [np.zeros_like(inputs[i]) for i in (0, 0, 1, 2)]
        for row, numbers in enumerate(segments):
            for document in np.unique(numbers):
                (positions,) = np.nonzero(numbers == document)
                span = slice(positions[0], positions[-1] + 1)
                results = run_on(cpu, reference, [x[row : row + 1, span] for x in inputs], "float32")
                for target, result in zip(packed_rows, results, strict=True):
                    target[row, span] = result[0]
        return packed_rows

    device, rows = jax.devices()[0], []
    expected = {"causal": run_on(cpu, reference, inputs, "float32"), "packed": documents_separately()}
    by_xla = packed(jax.device_put(jax.numpy.asarray(segments), device))
    runs = [("causal", "xla", causal("xla"), dtype) for dtype in BOUND]
    runs += [("packed", "xla", by_xla, dtype) for dtype in BOUND]
    by_cudnn = packed(jax.device_put(jax.numpy.asarray(segments), device), "cudnn")
    not_measured: dict[str, str] = {}  # where the trainer would not use cuDNN either
    for what, attend in (("causal", causal("cudnn")), ("packed", by_cudnn)):
        _, needs = fastest_attention(device, "bfloat16", length, workload.config.head_dim, what == "packed")
        if needs:
            not_measured[what] = f"not measured: cudnn {needs}"
            print(f"{what}: {not_measured[what]}")
        else:
            runs.append((what, "cudnn", attend, "bfloat16"))
    worst: dict[tuple[str, str, str], float] = {}
    for what, by, attend, dtype in runs:
        results = run_on(device, forward_and_backward(attend), inputs, dtype)
        for name, result, true in zip(("out", "d q", "d k", "d v"), results, expected[what], strict=True):
            error = float(np.sqrt(np.mean((result - true) ** 2) / np.mean(true**2)))
            bound = BOUND[dtype]
            if by == "cudnn":
                bound = min(bound, CUDNN_OVER_XLA * worst[what, "xla", name])
            elif dtype == "bfloat16":
                worst[what, by, name] = error
            rows.append({"attention": what, "by": by, "dtype": dtype, "of": name, "error": error, "bound": bound})
    for row in rows:
        row["passed"] = bool(row["error"] <= row["bound"])  # False for NaN
        print(f"{'pass' if row['passed'] else 'FAIL'}  {row}")
    content = {"device": device.device_kind, "rows": rows, "cudnn": not_measured or "measured"}
    flags.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if not all(row["passed"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
