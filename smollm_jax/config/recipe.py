"""The settings of a training run, shared by the JAX trainer and the PyTorch twin's. Framework-free.

The optimizer's numbers are the pre-training recipe's (huggingface/smollm, config_smollm2_135M.yaml).
"""

import dataclasses
from typing import Literal

from smollm_jax.errors import UsageError

Schedule = Literal["wsd", "cosine", "linear", "constant"]
Dtype = Literal["float32", "bfloat16", "float64"]
# What a layer saves for its backward pass. none: all activations; swiglu: the outputs of matmuls, RoPE, attention and
# SwiGLU; dots: the same without SwiGLU; full: only its input. The rest is recomputed.
Remat = Literal["none", "swiglu", "dots", "full"]
# Tokens whose logits the loss computes at once: 0.8 GB of float32 on a GPU, where fewer and larger matmuls are faster,
# and 0.1 GB on a CPU.
CHUNK_TOKENS, CPU_CHUNK_TOKENS = 4096, 512


def check_batch_divides(batch_size: int, devices: int, accumulation_steps: int) -> None:
    """Raises `UsageError` unless every device has the same number of sequences in every micro-batch."""
    if batch_size < 1 or batch_size % (devices * accumulation_steps):
        steps = f"{accumulation_steps} gradient accumulation steps"
        raise UsageError(f"--batch-size {batch_size} must be divisible by {devices} devices x {steps}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that determines the losses of a run, besides the model config, the data and the initial weights."""

    steps: int
    batch_size: int  # sequences per step
    sequence_length: int  # tokens per sequence
    learning_rate: float  # the peak
    warmup_steps: int
    dtype: Dtype  # of matmuls; weights, optimizer state, norms, softmax and loss are at least float32
    schedule: Schedule = "wsd"
    decay_fraction: float = 0.2  # of the steps, at the end; wsd only
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01  # on all parameters, including norms and embedding
    clip: float = 1.0  # of the global gradient norm
    validation_fraction: float = 0.01  # of the tokens, from the end of the token file
    seed: int = 0
    gradient_accumulation_steps: int = 1  # micro-batches per step
    mask_documents: bool = False  # attend only within a document; the pre-training recipe does not mask

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sequence_length"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "eps", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "decay_fraction", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < float("inf"):
            raise UsageError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.gradient_accumulation_steps < 1 or self.batch_size % self.gradient_accumulation_steps:
            raise UsageError(
                f"gradient_accumulation_steps must divide batch_size {self.batch_size}, "
                f"got {self.gradient_accumulation_steps}"
            )
        if self.seed < 0:
            raise UsageError(f"seed must be at least 0, got {self.seed}")
        if not 0 <= self.warmup_steps <= self.max_warmup_steps:
            limit = f"{self.max_warmup_steps} for these steps and this schedule"
            raise UsageError(f"warmup_steps must be between 0 and {limit}, got {self.warmup_steps}")

    @property
    def decay_start(self) -> int:
        """The first step of the decay phase; `steps` for schedules without one."""
        if self.schedule == "linear":
            return self.warmup_steps
        return self.steps - round(self.steps * self.decay_fraction) if self.schedule == "wsd" else self.steps

    @property
    def max_warmup_steps(self) -> int:
        """The maximum number of warm-up steps that the schedule allows."""
        return self.decay_start if self.schedule == "wsd" else self.steps - 1

    @property
    def rows_per_step(self) -> int:
        """Rows of tokens in the batch of one step."""
        return self.batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens in the batch of one step."""
        return self.rows_per_step * self.sequence_length

    @property
    def decays_norms(self) -> bool:
        """Whether weight decay is for the norms' scales, too."""
        return True
