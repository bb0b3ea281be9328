"""The model's numbers, its presets and training recipes; `hf_config` and `generation_config` are the files.

Imports no framework.
"""

from smollm_jax.config.model import Config
from smollm_jax.config.presets import PRESETS, preset
from smollm_jax.config.recipe import Recipe

__all__ = ["PRESETS", "Config", "Recipe", "preset"]
