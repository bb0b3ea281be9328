"""What a training run is, apart from the model: shared by the JAX trainer and the PyTorch twin's, framework-free.

The optimizer's numbers are the pre-training recipe's (huggingface/smollm, config_smollm2_135M.yaml).
"""

import dataclasses
from typing import Literal

from smollm_jax.errors import UsageError

Schedule = Literal["wsd", "cosine"]
Dtype = Literal["float32", "bfloat16", "float64"]
# What a layer keeps for its backward pass, the most first: everything; the results of matrix products (queries and keys
# rotated), of attention and of SwiGLU; those but SwiGLU's, which is computed again as norms are; its input alone.
Remat = Literal["none", "swiglu", "dots", "full"]
# Tokens whose logits the loss has in memory at once, on a GPU and on a CPU. A chunk's are 0.8 GB in float32 on a GPU,
# where fewer and larger products pay; 0.1 GB on a CPU.
CHUNK_TOKENS, CPU_CHUNK_TOKENS = 4096, 512


def check_batch_divides(batch_size: int, devices: int, parts: int) -> None:
    """Raises `UsageError` where devices, each in so many parts, would not all compute the same number of sequences."""
    if batch_size < 1 or batch_size % (devices * parts):
        raise UsageError(
            f"--batch-size {batch_size} must divide by {devices} devices x {parts} gradient accumulation steps"
        )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the numbers of a run: same recipe, data, config and start give the same losses."""

    steps: int
    batch_size: int  # sequences a step
    sequence_length: int  # tokens a sequence
    learning_rate: float  # the peak
    warmup_steps: int
    dtype: Dtype  # of the products; weights, moments, norms, softmax and loss stay in at least float32
    schedule: Schedule = "wsd"
    decay_fraction: float = 0.2  # of all steps, at the end, wsd only
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01  # on all parameters, norms and embedding too
    clip: float = 1.0  # of the global gradient norm
    validation_fraction: float = 0.01  # of the tokens, from the end of the token file
    seed: int = 0
    gradient_accumulation_steps: int = 1  # parts a batch is computed in, one after another
    mask_documents: bool = False  # tokens see their own document only; the recipe's windows run across borders

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
        if not 0 <= self.warmup_steps <= self.longest_warmup:
            raise UsageError(f"warmup_steps must be between 0 and {self.longest_warmup} here, got {self.warmup_steps}")

    @property
    def decay_start(self) -> int:
        """The first step whose learning rate may be below the peak again."""
        return self.steps - round(self.steps * self.decay_fraction) if self.schedule == "wsd" else self.steps

    @property
    def longest_warmup(self) -> int:
        """The most steps of warm-up that the schedule has room for."""
        return self.decay_start if self.schedule == "wsd" else self.steps - 1

    @property
    def tokens_per_step(self) -> int:
        """Tokens whose loss is averaged in one step."""
        return self.batch_size * self.sequence_length
