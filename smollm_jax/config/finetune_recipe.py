"""What a fine-tuning run is, apart from model and data, and such recipes by name. Framework-free.

Sources: where a recipe says nothing, the numbers are those of TRL 1.16's SFTConfig. `smollm2-sft` is
huggingface/alignment-handbook, recipes/smollm2/sft/config_smol.yaml, which SmolLM2-135M-Instruct was made with;
`smollm2-dpo` is recipes/smollm2/dpo/config_smol.yaml there.
"""

import dataclasses
import math
from typing import Any, Literal

from smollm_jax.config.recipe import Recipe, Schedule
from smollm_jax.errors import UsageError

Method = Literal["sft", "dpo"]
PairLoss = Literal["sigmoid", "ipo", "apo_zero", "robust"]
Learn = Literal["assistant", "completion", "all"]
# The projections that can have a LoRA adapter, peft's "all-linear": the head, tied to the embedding, is not among them.
LORA_TARGETS: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class FinetuneRecipe(Recipe):
    """Everything that decides the numbers of a fine-tuning run: same recipe, data and weights give the same losses."""

    schedule: Schedule = "linear"
    beta2: float = 0.999
    weight_decay: float = 0.0  # on all parameters but the norms' scales
    validation_fraction: float = 0.05  # of the examples, drawn by the seed
    method: Method = "sft"
    learn: Learn = "assistant"  # which tokens are learnt
    packing: bool = True  # several examples in one row, which do not see each other
    lora_rank: int = 0  # 0: all parameters are trained, and the next five fields are not used
    lora_alpha: float = 0.0
    lora_targets: str = "all-linear"  # or names separated by commas
    rslora: bool = False  # the scale is alpha / sqrt(rank), not alpha / rank
    lora_dropout: float = 0.0  # the share of the inputs of A that are zeroed, in training only
    base_sha256: str = ""  # of the weights that an adapter is trained on, or that a DPO run starts from
    beta: float = 0.1  # DPO: how strongly the model is held to the reference; this field and the next two are DPO's
    loss_type: PairLoss = "sigmoid"
    label_smoothing: float = 0.0  # the share of pairs whose answers are taken to be swapped; loss_type robust only

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank < 0 or (self.lora_rank and not 0 < self.lora_alpha < float("inf")):
            got = f"{self.lora_rank} and {self.lora_alpha}"
            raise UsageError(f"--lora-rank must be at least 1 and --lora-alpha positive, got {got}")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"--lora-dropout must be at least 0 and below 1, got {self.lora_dropout}")
        if self.lora_dropout and not self.lora_rank:
            raise UsageError("--lora-dropout needs --lora-rank: it is dropout of the adapter's inputs")
        if not 0 < self.beta < float("inf"):
            raise UsageError(f"--beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UsageError(f"--label-smoothing must be at least 0 and below 0.5, got {self.label_smoothing}")
        if self.label_smoothing and self.loss_type != "robust":
            raise UsageError(
                f"--label-smoothing is for --loss-type robust: {self.loss_type} does not use it, as in TRL"
            )
        if self.method == "dpo" and self.packing:
            raise UsageError("--method dpo does not pack: a row has one answer of a pair")

    @property
    def rows_per_step(self) -> int:
        """Rows of tokens in the batch of one step: a pair has two."""
        return self.batch_size * (2 if self.method == "dpo" else 1)

    @property
    def decays_norms(self) -> bool:
        """As in transformers' Trainer."""
        return False


@dataclasses.dataclass(frozen=True)
class NamedFinetuning:
    """The fields of a `FinetuneRecipe`, but for steps and warm-up, which depend on how much data there is."""

    fields: dict[str, Any]
    method: Method = "sft"
    lora_learning_rate: float | None = None  # the peak with an adapter; None: the same
    epochs: float = 3.0
    longest: int | None = None  # steps, where that is less
    warmup_fraction: float = 0.0  # of the steps

    def resolve(self, given: dict[str, Any], rows: int) -> FinetuneRecipe:
        """The recipe for so many rows of training data, with the fields in `given` instead of this run's."""
        fields: dict[str, Any] = {**self.fields, "method": self.method, **given}
        steps = max(1, math.ceil(self.epochs * rows / fields["batch_size"]))
        steps = fields.setdefault("steps", steps if self.longest is None else min(steps, self.longest))
        fields.setdefault("warmup_steps", min(math.ceil(steps * self.warmup_fraction), max(steps - 1, 0)))
        return FinetuneRecipe(**fields)


RECIPES = {
    # Ours, the default, small enough for a CPU. The peak is what 12 steps of 512 tokens took best (named_runs.py).
    "laptop-sft": NamedFinetuning(
        {"batch_size": 2, "sequence_length": 512, "learning_rate": 1e-4},
        lora_learning_rate=5e-4,
        longest=60,
        warmup_fraction=0.1,
    ),
    "laptop-dpo": NamedFinetuning(
        {"batch_size": 2, "sequence_length": 512, "learning_rate": 5e-6, "packing": False},
        method="dpo",
        lora_learning_rate=5e-5,
        longest=60,
        warmup_fraction=0.1,
    ),
    "smollm2-sft": NamedFinetuning(
        {
            "batch_size": 128,
            "sequence_length": 8192,
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "learn": "all",
            "dtype": "bfloat16",
        },
        epochs=2,
        warmup_fraction=0.1,
    ),
    "smollm2-dpo": NamedFinetuning(
        {
            "batch_size": 128,
            "sequence_length": 1024,
            "learning_rate": 1e-6,
            "schedule": "cosine",
            "beta": 0.5,
            "packing": False,
            "dtype": "bfloat16",
        },
        method="dpo",
        epochs=2,
        warmup_fraction=0.1,
    ),
}
DEFAULTS: dict[Method, str] = {"sft": "laptop-sft", "dpo": "laptop-dpo"}


def named(name: str) -> NamedFinetuning:
    """The recipe of that name; raises `UsageError` with the known names otherwise."""
    if name not in RECIPES:
        raise UsageError(f"--recipe {name}: unknown, known: {', '.join(RECIPES)}")
    return RECIPES[name]


def choose(name: str | None, method: Method | None) -> tuple[str, NamedFinetuning]:
    """The recipe that --recipe and --method name, or the method's default; raises `UsageError` if they differ."""
    name = name or DEFAULTS[method or "sft"]
    recipe = named(name)
    if method not in (None, recipe.method):
        raise UsageError(f"--recipe {name} is for --method {recipe.method}, not {method}")
    return name, recipe
