"""A model's forward and decode programs through `jax.export`, to be run without this package.

B rows, T or N tokens, S cache slots, L layers, K KV heads, H head dim, V vocab.
"""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from smollm_jax.model.attention import KVCache, attention, cached
from smollm_jax.model.smollm import SmolLM

PLATFORMS = ("cpu", "cuda")


def archive(model: SmolLM) -> dict[str, np.ndarray]:
    """The serialised programs `forward` and `decode`, and all parameters as `parameter_000`, `parameter_001`, ...

    NumPy cannot store bfloat16: such parameters are stored as uint16 and must be viewed as bfloat16 for the programs.
    """
    leaves, structure = jax.tree.flatten(model)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    config = model.config

    def forward(parameters: list[Array], tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        positions = jnp.arange(tokens.shape[1])
        mask = (positions <= positions[:, None])[None, None]

        def attend(q, k, v, cache):
            return attention(q, k, v, mask), cache

        return jax.tree.unflatten(structure, parameters)(tokens, attend=attend)

    def decode(parameters: list[Array], tokens: Int[Array, "B N"], keys: Any, values: Any, length: Int[Array, ""]):
        model = jax.tree.unflatten(structure, parameters)
        cache = KVCache(keys, values, length, jnp.zeros((), jnp.int32))
        positions = length + jnp.arange(tokens.shape[1])[None]
        attend = cached(jnp.zeros(tokens.shape[0], jnp.int32))
        hidden, cache = model.hidden_states(tokens, positions=positions, attend=attend, cache=cache)
        return model.logits(hidden), cache.keys, cache.values

    def ids(*shape: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    # Each program needs dimension names of its own.
    b, t = jax.export.symbolic_shape("b, t")
    c, n, s = jax.export.symbolic_shape("c, n, s", constraints=["n <= s"])
    shape = (config.num_hidden_layers, c, s, config.num_key_value_heads, config.head_dim)
    cache = jax.ShapeDtypeStruct(shape, model.embed_tokens.dtype)
    programs = {"forward": (forward, (ids(b, t),)), "decode": (decode, (ids(c, n), cache, cache, ids()))}
    arrays = {}
    for name, (function, arguments) in programs.items():
        exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(shapes, *arguments)
        arrays[name] = np.frombuffer(exported.serialize(), np.uint8)
    for number, leaf in enumerate(map(np.asarray, leaves)):
        bits = leaf.view(np.uint16) if leaf.dtype == jnp.bfloat16 else leaf
        arrays[f"parameter_{number:03}"] = bits
    return arrays
