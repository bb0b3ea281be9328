"""Text to token ids and back, chat templates, and the files that hold them. Imports no framework."""

from smollm_jax.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
