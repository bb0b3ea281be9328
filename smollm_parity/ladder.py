"""The measurements behind the parity claims, rung by rung, for the parity tests and the report.

Nothing here asserts: each function takes weights or a model and tokens and returns numbers, so that any weights can be
measured. JAX always uses `default_matmul_precision("highest")` in float32: on a GPU this disables TF32, on a CPU it
makes sums as exact as PyTorch's. The truth is the JAX model in float64; rung 1 compares it with the twin in float64.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax import weights
from smollm_jax.generation.quantized import Quantize, Quantized
from smollm_jax.model.attention import Implementation, KVCache, UnstackedKVCache, cached_unstacked, causal
from smollm_jax.model.ops import rms_norm, rope_cos_sin
from smollm_jax.model.smollm import Remat, SmolLM
from smollm_jax.runs.pytree import flatten
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.loss import mean_loss
from smollm_jax.weights import mapping
from smollm_jax.weights.bundle import Bundle
from smollm_jax.weights.torch_file import from_torch

Arrays = dict[str, np.ndarray]


@contextmanager
def precisely(dtype: str) -> Iterator[None]:
    """Enables float64 if `dtype` is float64, and full-precision float32 matmuls."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        yield


# ------------------------------------------------------------------------------- residual stream and logits


@functools.partial(jax.jit, static_argnames=("dtype", "implementation"))
def _jax_stream(model: SmolLM, tokens: Any, dtype: str, implementation: Implementation) -> tuple[Any, Any]:
    cos, sin = rope_cos_sin(jnp.arange(tokens.shape[1])[None], model.config, dtype)
    layers, norm = jax.tree.map(lambda p: p.astype(dtype), (model.layers, model.norm[...]))

    def step(x, layer):
        x, _ = layer(x, cos, sin, causal(implementation), None)
        return x, x

    x, stream = jax.lax.scan(step, model.embed_tokens[...][tokens].astype(dtype), layers)
    return stream, model.logits(rms_norm(x, norm, model.config.rms_norm_eps))


def jax_stream(
    bundle: Bundle, tokens: np.ndarray, dtype: str, implementation: Implementation = "xla"
) -> tuple[np.ndarray, np.ndarray]:
    """The JAX model's residual stream after each layer `[L, B, T, D]`, and its logits `[B, T, V]`."""
    with precisely(dtype):
        stored = "float64" if dtype == "float64" else "float32"
        model = weights.from_bundle(bundle, stored)
        stream, logits = _jax_stream(model, jnp.asarray(tokens), dtype, implementation)
        return np.asarray(stream, np.float64), np.asarray(logits)


@functools.partial(jax.jit, static_argnames=("dtype", "operands"))
def _jax_logits(model: SmolLM, tokens: Any, dtype: str, operands: str) -> Any:
    return model(tokens, dtype=dtype, operands=operands)


def jax_operand_logits(bundle: Bundle, tokens: np.ndarray) -> np.ndarray:
    """The JAX model's logits as in bfloat16 training on a CPU: matmuls of bfloat16 operands with float32 results."""
    return np.asarray(_jax_logits(weights.from_bundle(bundle), jnp.asarray(tokens), "float32", "bfloat16"))


def autocast_logits(module: Any, tokens: np.ndarray) -> np.ndarray:
    """A float32 torch model's logits under bfloat16 autocast."""
    import torch

    device = next(module.parameters()).device
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        out = module(torch.tensor(tokens, device=device))
    return getattr(out, "logits", out).float().cpu().numpy()


def decoded(bundle: Bundle, tokens: np.ndarray, kind: Quantize) -> np.ndarray:
    """Logits `[B, T, V]` of the quantised model, decoded token by token with its cache."""
    model = Quantized.from_model(weights.from_bundle(bundle), kind)
    start = jnp.zeros(len(tokens), jnp.int32)

    @jax.jit
    def step(model, cache, column):
        positions, attend = (cache.length - start)[:, None], cached_unstacked(start)
        hidden, cache = model.hidden_states(column[:, None], positions=positions, attend=attend, cache=cache)
        return cache.advance(1), model.logits(hidden)[:, 0]

    cache, logits = (
        UnstackedKVCache.from_stacked(KVCache.empty(bundle.config, len(tokens), tokens.shape[1], jnp.float32)),
        [],
    )
    for column in tokens.T:
        cache, row = step(model, cache, jnp.asarray(column))
        logits.append(np.asarray(row))
    return np.stack(logits, axis=1)


def torch_stream(module: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of a torch model, the twin or transformers' own, in the precision of its parameters."""
    import torch

    stream: list[np.ndarray] = []

    def keep(_module, _inputs, output):
        stream.append((output[0] if isinstance(output, tuple) else output).double().cpu().numpy())

    hooks = [layer.register_forward_hook(keep) for layer in module.model.layers]
    try:
        with torch.inference_mode():
            out = module(torch.tensor(tokens, device=next(module.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    logits = getattr(out, "logits", out)
    return np.stack(stream), logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu().numpy()


# ------------------------------------------------------------------------------------- gradients of the loss


def jax_gradients(
    bundle: Bundle, tokens: np.ndarray, dtype: str, remat: Remat = "dots", operands: str = ""
) -> tuple[float, Arrays]:
    """Mean next-token loss of `[B, T + 1]` tokens and its gradient, in Hugging Face's names and layout."""
    with precisely(dtype):
        model = weights.from_bundle(bundle, dtype)
        execution = ExecutionConfig(dtype, remat=remat, operands=operands)
        loss, gradient = jax.jit(jax.value_and_grad(lambda m, t: mean_loss(m, t, execution)[0]))(
            model, jnp.asarray(tokens)
        )
        arrays = {path: np.asarray(array) for path, array in flatten(gradient).items()}
        return float(loss), mapping.to_hf(arrays, bundle.config)


def torch_gradients(module: Any, tokens: np.ndarray) -> tuple[float, Arrays]:
    """The same of a torch model, in the precision of its parameters."""
    import torch
    from torch.nn import functional

    module.zero_grad(set_to_none=True)
    device = next(module.parameters()).device
    inputs = torch.tensor(tokens[:, :-1].astype(np.int64), device=device)
    out = module(inputs)
    logits = getattr(out, "logits", out)
    targets = torch.tensor(tokens[:, 1:].astype(np.int64), device=device)
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    gradient = {name: from_torch(p.grad.cpu().clone()) for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return float(loss.detach()), gradient
