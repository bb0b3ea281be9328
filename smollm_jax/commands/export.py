"""Write a model's programs and weights into one file that JAX runs without this package.

    python scripts/export.py runs/my-run my-run.npz
    python scripts/export.py assets/SmolLM2-135M-Instruct instruct.npz --dtype bfloat16
    python examples/load_exported.py instruct.npz 504 3575 282 4649 314       # a loader to copy: 30 lines

The file is a NumPy archive: the StableHLO of `forward` and `decode` as `jax.export` serialises it, lowered for CPU and
CUDA with symbolic batch and lengths, and the parameters in the order of the programs' arguments. A reader needs JAX,
NumPy and flatbuffers.

    forward(parameters, tokens [b, t]) -> logits [b, t, V]
    decode(parameters, tokens [b, n], keys, values [L, b, s, K, H], length) -> logits [b, n, V], keys, values

`decode` reads a prompt (n tokens into an empty cache) and each token after it (n = 1); `length` is the number of cache
slots in use. Attention materializes a t x t mask: for long contexts use the package.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import tyro

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.config.hf_config import config_to_hf
from smollm_jax.runtime import install


@dataclasses.dataclass(frozen=True)
class Flags:
    src: tyro.conf.Positional[Path]
    """Weights in any format."""
    dst: tyro.conf.Positional[Path]
    """The .npz file to write; must not exist."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights, matmuls and cache; logits are float32."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__, weights=("src",))
    if flags.dst.suffix != ".npz":
        raise errors.UsageError(f"{flags.dst}: the file name must end in .npz")
    if flags.dst.exists():
        raise errors.UsageError(f"{flags.dst}: exists already; name another target or remove it first")
    try:
        import flatbuffers  # noqa: F401  # jax.export serialises with it
    except ImportError as error:
        raise errors.UsageError(install.needs("export.py", "export")) from error
    import jax.numpy as jnp
    import numpy as np

    from smollm_jax import weights
    from smollm_jax.generation import export
    from smollm_jax.runtime.atomic import replacing

    model, config = weights.load(flags.src, jnp.dtype(flags.dtype))
    arrays = export.archive(model)
    arrays["config"] = np.frombuffer(json.dumps(config_to_hf(config, flags.dtype)).encode(), np.uint8)
    with replacing(flags.dst) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # NumPy's stub takes an array for `allow_pickle`
    size = flags.dst.stat().st_size
    print(f"{flags.dst}: forward and decode for {', '.join(export.PLATFORMS)}, {flags.dtype}, {size / 1e6:,.1f} MB")
