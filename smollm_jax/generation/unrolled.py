"""The model in a layout for decoding: layers unrolled, projections fused, head transposed.

A scan over stacked layers copies each layer's weights before it multiplies, which costs decoding half its speed: one
token does little else than read the weights. Its program is ten times quicker to compile, so prefill keeps the scan.
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
    """A model beside copies of its layers and of its head: about twice the memory, and twice the speed on a CPU."""

    model: SmolLM
    layers: tuple[DecoderLayer, ...]
    head: Float[Array, "D V"]

    @classmethod
    def of(cls, model: SmolLM) -> "Unrolled":
        """The model's weights, laid out anew; its embedding and norms are shared."""
        count, layers = range(model.config.num_hidden_layers), fuse_projections(model.layers)
        layers = tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in count)
        return cls(model, layers, jnp.array(model.head.T))

    @property
    def config(self) -> Config:
        return self.model.config

    def hidden_states(
        self, tokens: Int[Array, "B T"], *, positions: Int[Array, "B T"], attend: Attend, cache: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        """`SmolLM.hidden_states` of tokens known to be in the vocabulary."""
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
