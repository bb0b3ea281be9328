"""How a step is executed (dtypes, attention, remat, micro-batches, mesh), and how often a run saves and validates."""

import dataclasses
from typing import Any, get_args

import jax

from smollm_jax.config import Config
from smollm_jax.config.recipe import Remat
from smollm_jax.errors import UsageError
from smollm_jax.model.attention import Implementation, cudnn_device_problem, cudnn_shape_problem


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How a step is computed; hashable, so that the jitted step takes it as a static argument."""

    dtype: str  # of activations
    attention: Implementation = "xla"
    remat: Remat = "dots"
    unroll: int = 1  # layers unrolled per step of the layer scan
    accumulation_steps: int = 1  # micro-batches of a batch, on each device
    mesh: jax.sharding.Mesh | None = None  # None: one device
    separator_id: int | None = None  # eos id: set to mask attention across documents; None: windows cross them
    operands: str = ""  # dtype of matmul operands; default: `dtype`

    def __post_init__(self) -> None:
        object.__setattr__(self, "operands", self.operands or self.dtype)
        if self.unroll < 1:
            raise UsageError(f"--unroll must be at least 1, got {self.unroll}")
        if self.remat not in get_args(Remat):
            raise UsageError(f"--remat must be one of {', '.join(get_args(Remat))}, got {self.remat!r}")

    @property
    def devices(self) -> int:
        """The number of devices that share a batch."""
        return self.mesh.size if self.mesh else 1


def fastest_attention(
    device: Any, dtype: str, sequence_length: int, head_dim: int, documents: bool
) -> tuple[Implementation, str]:
    """ "cudnn" if cuDNN's attention runs here, else "xla"; and what cuDNN lacks, as the end of a sentence "cudnn ...".

    `device` is a `jax.Device`, or anything with the `platform` and `compute_capability` of one.
    """
    lacks = cudnn_device_problem(device, dtype) or cudnn_shape_problem(sequence_length, head_dim, documents)
    return ("xla", lacks) if lacks else ("cudnn", "")


def default_unroll(config: Config, attention: Implementation) -> int:
    """The default of `ExecutionConfig.unroll`: all layers with cuDNN's attention, else one.

    On a GPU `lax.scan` zero-initializes its stacked residuals and copies every layer's activations into them: a third
    of the bytes moved outside matmuls. Unrolling avoids that and takes three times as long to compile. With
    blocked attention XLA then also starts many layers' attention at once, and `remat` "full" needs twice the memory.
    """
    return config.num_hidden_layers if attention == "cudnn" else 1


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Steps between checkpoints and between validations (0: after the last step only); batches of a validation."""

    save_every: int
    eval_every: int
    eval_batches: int = 8

    def __post_init__(self) -> None:
        for flag, value in (("--save-every", self.save_every), ("--eval-every", self.eval_every)):
            if value < 0:
                raise UsageError(f"{flag} must be at least 0, got {value}")
        if self.eval_batches < 1:
            raise UsageError(f"eval_batches must be at least 1, got {self.eval_batches}")
