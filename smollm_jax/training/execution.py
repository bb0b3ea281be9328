"""How a step is executed (dtypes, attention, remat, micro-batches, mesh), and how often a run saves and validates."""

import dataclasses
from typing import Any, get_args

import jax

from smollm_jax.config import Config
from smollm_jax.config.recipe import Remat
from smollm_jax.errors import UsageError
from smollm_jax.model.attention import Implementation, cudnn_device_problem, cudnn_shape_problem


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the same numbers are computed; hashable, so that the jitted step takes it as a static argument."""

    dtype: str  # of activations
    implementation: Implementation = "xla"
    remat: Remat = "dots"
    unroll: int = 1
    parts: int = 1  # of a batch, or of what one device has of it, computed one after another
    mesh: jax.sharding.Mesh | None = None  # None: one device
    document_end: int | None = None  # the token that ends documents which shall not see each other
    operands: str = ""  # dtype of what matrix products multiply; default: `dtype`

    def __post_init__(self) -> None:
        object.__setattr__(self, "operands", self.operands or self.dtype)
        if self.unroll < 1:
            raise UsageError(f"unroll must be at least 1, got {self.unroll}")
        if self.remat not in get_args(Remat):
            raise UsageError(f"remat must be one of {', '.join(get_args(Remat))}, got {self.remat!r}")

    @property
    def devices(self) -> int:
        """How many a batch is divided among."""
        return self.mesh.size if self.mesh else 1


def fastest_attention(
    device: Any, dtype: str, sequence_length: int, head_dim: int, documents: bool
) -> tuple[Implementation, str]:
    """cuDNN's attention where it runs, else XLA's; and what cuDNN's would need, to follow "cudnn".

    `device` is a `jax.Device`, or anything with the `platform` and `compute_capability` of one.
    """
    needs = cudnn_device_problem(device, dtype) or cudnn_shape_problem(sequence_length, head_dim, documents)
    return ("xla", needs) if needs else ("cudnn", "")


def layers_at_once(config: Config, implementation: Implementation) -> int:
    """`Compute.unroll` where nobody chose: all layers with cuDNN's attention, else one.

    A GPU's loop first fills what layers keep with zeros, then copies each result into it: a third of all that is moved
    outside matrix products. Without a loop a step takes three times as long to compile. With attention in blocks, too,
    XLA begins many layers' at once, and `remat` full needs twice the memory.
    """
    return config.num_hidden_layers if implementation == "cudnn" else 1


@dataclasses.dataclass(frozen=True)
class Cadence:
    """How often a run stops to look around, in steps; 0 for never."""

    save_every: int
    eval_every: int
    eval_batches: int = 8

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < (1 if name == "eval_batches" else 0):
                raise UsageError(f"{name} must be at least {1 if name == 'eval_batches' else 0}, got {value}")
