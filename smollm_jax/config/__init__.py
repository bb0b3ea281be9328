"""The model config, its presets, training recipes, and Hugging Face's `config.json` and `generation_config.json`.

Imports no framework.
"""

from smollm_jax.config.model import Config
from smollm_jax.config.presets import PRESETS, preset
from smollm_jax.config.recipe import Recipe

__all__ = ["PRESETS", "Config", "Recipe", "preset"]
