"""Weights in every format: `mapping` has the rule of each tensor (such as `q_proj`), one module reads and writes each
format, and `convert` converts between them. Imports no framework."""

from smollm_jax.weights.convert import Kind, generation_of, kind_of, read, write
from smollm_jax.weights.jax_model import from_bundle, load, to_bundle

__all__ = ["Kind", "from_bundle", "generation_of", "kind_of", "load", "read", "to_bundle", "write"]
