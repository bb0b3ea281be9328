"""Complete training runs by name, for `train_jax.py --recipe NAME`. Framework-free.

Sources: the pre-training recipe is huggingface/smollm, text/pretraining/smollm2/config_smollm2_135M.yaml. Values marked
"ours" were chosen for this project, and such a run has not been completed yet.
"""

import dataclasses
from typing import Any

from smollm_jax.config.recipe import Recipe
from smollm_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class LearningRateDefaults:
    """Peak learning rate and warm-up where neither a flag nor a named run sets them."""

    peak: float
    min_warmup_steps: int  # the default is 5% of the run, but at least this
    start: str  # what such a run starts from


# 1e-3: the pre-training recipe's 3e-3 is for 1M tokens a step. 3e-5: 12 steps of 2 x 256 tokens of assets/sotu improve
# SmolLM2-135M-Instruct from 0.932 to 0.902 bits per byte of held-out text (1e-4: 0.887; 1e-3: 1.032).
FROM_SCRATCH = LearningRateDefaults(1e-3, 0, "new parameters")
FROM_WEIGHTS = LearningRateDefaults(3e-5, 10, "trained weights")


@dataclasses.dataclass(frozen=True)
class NamedRun:
    """A preset to train and the fields of its `Recipe`; `resolve` and `Recipe` have defaults for the others."""

    preset: str
    fields: dict[str, Any]
    continues_weights: bool = False  # trains weights further, with the preset's rope_theta and length

    def resolve(self, overrides: dict[str, Any], *, trained: bool = False) -> Recipe:
        """The recipe of this run with the fields in `overrides`; `trained`: the run starts from trained weights."""
        fields, defaults = self._fields(trained) | overrides, FROM_WEIGHTS if trained else FROM_SCRATCH
        recipe = Recipe(**({"learning_rate": defaults.peak, "warmup_steps": 0, "dtype": "float32"} | fields))
        if "warmup_steps" in fields:
            return recipe
        minimum = min(defaults.min_warmup_steps, recipe.steps // 2)  # the first warm-up step has a rate of 0
        warmup = min(max(recipe.steps // 20, minimum), recipe.max_warmup_steps)
        return dataclasses.replace(recipe, warmup_steps=warmup)

    def explain(self, overrides: dict[str, Any], *, trained: bool = False) -> str:
        """A phrase that says which of peak and warm-up are defaults; "" when both are in `overrides`."""
        fields, defaults = self._fields(trained), FROM_WEIGHTS if trained else FROM_SCRATCH
        peak = f"peak {defaults.peak}"
        if trained:
            original = self.fields.get("learning_rate", FROM_SCRATCH.peak)
            peak += f" (not {original}, which is for {FROM_SCRATCH.start})"
        phrases = {"learning_rate": peak, "warmup_steps": "warm-up"}
        defaulted = [phrase for name, phrase in phrases.items() if name not in fields | overrides]
        return f"{' and '.join(defaulted)} by default for {defaults.start}" if defaulted else ""

    def _fields(self, trained: bool) -> dict[str, Any]:
        """The fields of this run; for trained weights without the peak and warm-up of a run from scratch."""
        drop = ("learning_rate", "warmup_steps") if trained and not self.continues_weights else ()
        return {name: value for name, value in self.fields.items() if name not in drop}


RECIPES = {
    # The default without a GPU: about 10 minutes on 2 cores, in the dtype that is faster on this CPU.
    "demo": NamedRun("smollm2-135m-pretrain", {"steps": 200, "batch_size": 2, "sequence_length": 256}),
    # The default on a GPU.
    "gpu-demo": NamedRun(
        "smollm2-135m-pretrain", {"steps": 5000, "batch_size": 8, "sequence_length": 2048, "dtype": "bfloat16"}
    ),
    # Ours: 18.4 billion tokens, 136 a parameter: 23.7 hours at 215,000 tokens/s (docs/scaling.md). The batch is a
    # quarter of the pre-training recipe's, so the peak is half of its peak (square root scaling).
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
    # 2.1 trillion tokens, 1,048,576 a step. AdamW, gradient clipping and decay are `Recipe`'s defaults.
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
    # Context extension to the released config's theta 100,000 and 8,192 positions. How the 135M was extended is not
    # public; the 1.7B was before the last 75 of its 11,000 billion tokens, on other data (arXiv 2502.02737, section
    # 4.6). Ours: the same share of the tokens (15.7 billion), the same tokens a step, a tenth of the peak.
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
        continues_weights=True,
    ),
}


def by_name(name: str) -> NamedRun:
    """The run of that name; raises `UsageError` that lists the known names."""
    if name not in RECIPES:
        raise UsageError(f"--recipe {name}: unknown, choose from {', '.join(RECIPES)}")
    return RECIPES[name]
