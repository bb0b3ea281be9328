"""Weights in every format, converted in every direction. Importing it imports no framework."""

from smollm_jax.weights.convert import Kind, generation_of, kind_of, read, write
from smollm_jax.weights.jax_model import from_bundle, load, to_bundle

__all__ = ["Kind", "from_bundle", "generation_of", "kind_of", "load", "read", "to_bundle", "write"]
