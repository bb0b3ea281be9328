"""The tokenizer, its chat templates, and readers of their files. Imports no framework."""

from smollm_jax.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
