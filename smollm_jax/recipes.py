"""Whole runs by name, for `train_jax.py --recipe NAME`. Framework-free.

Sources: the pre-training recipe is huggingface/smollm, text/pretraining/smollm2/config_smollm2_135M.yaml. Everything
called ours was chosen here, and has not been run to its end.
"""

import dataclasses
from typing import Any

from smollm_jax.errors import UsageError
from smollm_jax.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class NamedRun:
    """A preset to train and the fields of its `Recipe`; what is left out is `resolve`'s or the recipe's own default."""

    preset: str
    fields: dict[str, Any]
    continues: bool = False  # trained weights, which take the preset's theta and length

    def resolve(self, given: dict[str, Any]) -> Recipe:
        """The recipe, with the fields in `given` instead of this run's."""
        fields = self.fields | given
        # 1e-3: the pre-training recipe's 3e-3 is for 1M tokens a step.
        return Recipe(**({"learning_rate": 1e-3, "warmup_steps": fields["steps"] // 20} | fields))


RECIPES = {
    # About 10 minutes on 2 cores, loss clearly down: what is run where there is no GPU.
    "demo": NamedRun(
        "smollm2-135m-pretrain", {"steps": 200, "batch_size": 2, "sequence_length": 256, "dtype": "float32"}
    ),
    # What is run on a GPU.
    "gpu-demo": NamedRun(
        "smollm2-135m-pretrain", {"steps": 5000, "batch_size": 8, "sequence_length": 2048, "dtype": "bfloat16"}
    ),
    # Ours: 18.4 billion tokens, 136 a parameter, which 215,000 tokens/s compute in 23.7 hours (docs/scaling.md). A
    # quarter of the pre-training recipe's batch, at half its peak: the square root of the batch's ratio.
    "one-gpu-day": NamedRun(
        "smollm2-135m-pretrain",
        {
            "steps": 70_000,
            "batch_size": 128,
            "sequence_length": 2048,
            "gradient_accumulation_steps": 8,
            "learning_rate": 1.5e-3,
            "warmup_steps": 2000,
            "dtype": "bfloat16",
        },
    ),
    # 2.1 trillion tokens, 1,048,576 a step. AdamW's numbers, the clip and the decay are `Recipe`'s defaults.
    "smollm2-135m": NamedRun(
        "smollm2-135m-pretrain",
        {
            "steps": 2_000_000,
            "batch_size": 512,
            "sequence_length": 2048,
            "learning_rate": 3e-3,
            "warmup_steps": 2000,
            "dtype": "bfloat16",
        },
    ),
    # Theta 100,000 and 8,192 positions are the released config's. How the 135M got there is not public; of the 1.7B,
    # its paper (arXiv 2502.02737, section 4.6) says: from before its last 75 of 11,000 billion tokens, on other data.
    # Ours: the same share of the tokens (15.7 billion), the same tokens a step, a tenth of the peak.
    "smollm2-135m-long": NamedRun(
        "smollm2-135m",
        {
            "steps": 15_000,
            "batch_size": 128,
            "sequence_length": 8192,
            "learning_rate": 3e-4,
            "warmup_steps": 500,
            "dtype": "bfloat16",
        },
        continues=True,
    ),
}


def named(name: str) -> NamedRun:
    """The run of that name; raises `UsageError` with the known names otherwise."""
    if name not in RECIPES:
        raise UsageError(f"--recipe {name}: unknown, known: {', '.join(RECIPES)}")
    return RECIPES[name]
