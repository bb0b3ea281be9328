"""Run a file of scripts/export.py: token ids in, greedy token ids out. A program to copy.

Needs JAX, NumPy and flatbuffers, which jax.export reads with: pip install jax flatbuffers

python examples/load_exported.py model.npz 504 3575 282 4649 314
"""

import json
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

file, *prompt = sys.argv[1:]
archive = np.load(file)
config = json.loads(archive["config"].tobytes())
forward, decode = (jax.jit(jax.export.deserialize(bytearray(archive[name])).call) for name in ("forward", "decode"))
dtype = jnp.dtype(config["dtype"])
parameters = [jnp.asarray(archive[name]).view(dtype) for name in sorted(archive.files) if name.startswith("parameter")]
tokens = [int(token) for token in prompt]
slots = len(tokens) + 32
shape = (config["num_hidden_layers"], 1, slots, config["num_key_value_heads"], config["head_dim"])
keys = values = jnp.zeros(shape, dtype)
new, length = jnp.asarray([tokens], jnp.int32), 0
while len(tokens) < slots:
    logits, keys, values = decode(parameters, new, keys, values, jnp.int32(length))
    length += new.shape[1]
    tokens.append(int(logits[0, -1].argmax()))
    new = jnp.asarray([tokens[-1:]], jnp.int32)
print(*tokens[len(prompt) :])
assert int(forward(parameters, jnp.asarray([tokens], jnp.int32))[0, -2].argmax()) == tokens[-1]
