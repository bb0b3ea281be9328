"""Whole runs by name, for `train_jax.py --recipe NAME`. Framework-free.

Sources: the pre-training recipe is huggingface/smollm, text/pretraining/smollm2/config_smollm2_135M.yaml. Everything
called ours was chosen here, and has not been run to its end.
"""

import dataclasses
from typing import Any

from smollm_jax.config.recipe import Recipe
from smollm_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Defaults:
    """The peak learning rate and the warm-up where neither a flag nor a named run gives them."""

    learning_rate: float
    shortest_warmup: int  # steps; a twentieth of the run where that is more
    parameters: str  # that a run starts from


# 1e-3: the pre-training recipe's 3e-3 is for 1M tokens a step. 3e-5: what 12 steps of 2 x 256 tokens of assets/sotu
# make of SmolLM2-135M-Instruct: 0.932 bits per byte of held-out text before, 0.902 after (1e-4: 0.887; 1e-3: 1.032).
NEW = Defaults(1e-3, 0, "new parameters")
TRAINED = Defaults(3e-5, 10, "trained weights")


@dataclasses.dataclass(frozen=True)
class NamedRun:
    """A preset to train and the fields of its `Recipe`; what is left out is `resolve`'s or the recipe's own default."""

    preset: str
    fields: dict[str, Any]
    continues: bool = False  # trained weights, which take the preset's theta and length

    def resolve(self, given: dict[str, Any], *, trained: bool = False) -> Recipe:
        """The recipe, with the fields in `given` instead of this run's; `trained`: it starts from trained weights."""
        fields, defaults = self._fields(trained) | given, TRAINED if trained else NEW
        recipe = Recipe(**({"learning_rate": defaults.learning_rate, "warmup_steps": 0, "dtype": "float32"} | fields))
        if "warmup_steps" in fields:
            return recipe
        shortest = min(defaults.shortest_warmup, recipe.steps // 2)  # the first step of a warm-up changes nothing
        warmup = min(max(recipe.steps // 20, shortest), recipe.longest_warmup)
        return dataclasses.replace(recipe, warmup_steps=warmup)

    def explain(self, given: dict[str, Any], *, trained: bool = False) -> str:
        """Where `resolve` takes the peak and the warm-up from, as a phrase; "" when both are in `given`."""
        fields, defaults = self._fields(trained), TRAINED if trained else NEW
        peak = f"peak {defaults.learning_rate}"
        if trained:
            peak += f" (not {self.fields.get('learning_rate', NEW.learning_rate)}, which is for {NEW.parameters})"
        named = {"learning_rate": peak, "warmup_steps": "warm-up"}
        default = [text for name, text in named.items() if name not in fields | given]
        return f"{' and '.join(default)} by default for {defaults.parameters}" if default else ""

    def _fields(self, trained: bool) -> dict[str, Any]:
        """This run's, without the peak and warm-up of a run that was made for new parameters."""
        drop = ("learning_rate", "warmup_steps") if trained and not self.continues else ()
        return {name: value for name, value in self.fields.items() if name not in drop}


RECIPES = {
    # About 10 minutes on 2 cores, loss clearly down: what is run where there is no GPU. In the dtype that this CPU
    # multiplies faster.
    "demo": NamedRun("smollm2-135m-pretrain", {"steps": 200, "batch_size": 2, "sequence_length": 256}),
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
