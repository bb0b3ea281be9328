"""Estimates whether the backends of a training benchmark fit into a GPU's memory; `scripts/gpu_suite.sh` runs it first.

    python -m benchmarks.room 80.0 train --dtype bfloat16 --batch-size 32 --sequence-length 2048

The first argument is the GPU's memory in GB, the rest are `scripts/benchmark.py`'s. Prints what each backend needs. If
the batch does not fit, it also prints the largest one that does, and exits with 3. "train" holds all backends at once,
"memory" one at a time. No estimate was checked on a GPU yet; that of transformers' backend errs on the high side.
"""

import dataclasses
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # it only estimates

import tyro

from benchmarks.options import Flags
from smollm_jax.config import Recipe, preset
from smollm_jax.model.attention import Implementation
from smollm_jax.model.cost import count_parameters
from smollm_jax.training import memory
from smollm_jax.training.execution import ExecutionConfig


def main(gigabytes: float, arguments: list[str]) -> int:
    """The exit status."""
    flags = tyro.cli(Flags, args=arguments)
    assert flags.what in ("train", "memory"), flags.what
    need = needs(flags, gigabytes)
    if fits(flags, gigabytes):
        return 0
    smaller = [rows for rows in (1 << n for n in range(flags.batch_size.bit_length())) if rows < flags.batch_size]
    fitting = [rows for rows in smaller if fits(dataclasses.replace(flags, batch_size=rows), gigabytes)]
    estimates = " and ".join(f"{size:.0f} GB for {backend}" for backend, size in need.items())
    instead = f"--batch-size {fitting[-1]} fits" if fitting else "no batch size fits"
    print(f"estimated memory of {estimates} exceeds {memory.USABLE_FRACTION:.0%} of {gigabytes:.0f} GB; {instead}")
    return 3


def fits(flags: Flags, gigabytes: float) -> bool:
    together = max if flags.what == "memory" else sum
    return together(needs(flags, gigabytes).values()) <= memory.USABLE_FRACTION * gigabytes


def needs(flags: Flags, gigabytes: float) -> dict[str, float]:
    """Estimated GB of each backend."""
    baselines = {backend: torch_bytes(flags, backend) / 1e9 for backend in flags.baselines}
    return {"ours": jax_bytes(flags, gigabytes) / 1e9} | baselines


def jax_bytes(flags: Flags, gigabytes: float) -> int:
    """The planned memory of our step, with the `remat` that the trainer would choose on this GPU."""
    config = preset(flags.preset)
    recipe = Recipe(
        1000, flags.batch_size, flags.sequence_length, learning_rate=1e-3, warmup_steps=0, dtype=flags.dtype
    )
    attention: Implementation = "cudnn" if flags.dtype == "bfloat16" else "xla"
    execution = ExecutionConfig(flags.dtype, attention, flags.remat or "dots", 1)
    if flags.remat is None:
        execution = memory.choose_remat(config, recipe, execution, "gpu", int(gigabytes * 1e9))
    return memory.estimate(config, recipe, execution, "gpu").total


def torch_bytes(flags: Flags, backend: str) -> int:
    """The estimated memory of PyTorch's step: parameters, gradients, optimizer state, residuals, transformers' logits.

    For its backward pass a layer stores the residual stream twice in float32 and, in the matmuls' dtype, the outputs of
    both norms, queries, keys, values, the attention's output, and the MLP's gate, up and their product. transformers
    holds logits and their gradient in float32 and in the matmuls' dtype; the twin computes them in chunks.
    """
    config, narrow, M = preset(flags.preset), memory.BYTES[flags.dtype], flags.batch_size * flags.sequence_length
    D, F, L, H = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.head_dim
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    residuals = L * M * (4 * 2 * D + narrow * (2 * D + heads * H + 3 * F))
    logits = 0 if backend.startswith("twin") else M * config.vocab_size * (4 + 4 + 2 * narrow)
    return 16 * count_parameters(config) + residuals + logits


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
