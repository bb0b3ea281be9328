"""The model in a layout for decoding: layers unrolled, projections fused, head transposed.

A scan over stacked layers copies each layer's weights before the matmul. DecodeState a token does little more than read
the weights, so the copy would halve its speed. Prefill keeps the scan, which compiles ten times faster.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from smollm_jax.config import Config
from smollm_jax.model.attention import Attend
from smollm_jax.model.ops import linear, rms_norm, rope_cos_sin
from smollm_jax.model.smollm import DecoderLayer, SmolLM, fuse_projections


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unrolled:
    """A model with copies of its layers and head for decoding: about twice the memory, twice the speed on a CPU."""

    model: SmolLM
    layers: tuple[DecoderLayer, ...]
    head: Float[Array, "D V"]

    @classmethod
    def from_model(cls, model: SmolLM) -> "Unrolled":
        """Copies the weights of the layers and the head; the embedding and the last norm are shared."""
        stacked = fuse_projections(model.layers)
        indices = range(model.config.num_hidden_layers)
        layers = tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in indices)
        return cls(model, layers, jnp.array(model.head.T))

    @property
    def config(self) -> Config:
        return self.model.config

    def hidden_states(
        self, tokens: Int[Array, "B T"], *, positions: Int[Array, "B T"], attend: Attend, cache: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        """`SmolLM.hidden_states` for tokens already known to be in the vocabulary."""
        x = self.model.embed_tokens[...][tokens]
        cos, sin = rope_cos_sin(positions, self.config, x.dtype)
        for layer in self.layers:
            x, cache = layer(x, cos, sin, attend, cache)
        return rms_norm(x, self.model.norm[...], self.config.rms_norm_eps), cache

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """`SmolLM.logits`."""
        if hidden.dtype == jnp.bfloat16:
            return jnp.einsum("BTD,DV->BTV", hidden, self.head, preferred_element_type=jnp.float32)
        return linear(hidden, self.head)
