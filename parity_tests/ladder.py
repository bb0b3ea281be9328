"""The measurements behind the parity claims, rung by rung: what the tests assert on and the report shows.

Nothing here asserts. Each function takes models on the same weights and real tokens and returns plain numbers, so that
any weights can be measured. JAX is always asked for `default_matmul_precision("highest")` in float32: on a GPU that
turns TF32 off, on a CPU it makes sums as exact as PyTorch's. The truth is the JAX model in float64, which rung 1 holds
against the twin in float64.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

from smollm_jax import weights
from smollm_jax.attention import causal
from smollm_jax.checkpoint import flatten
from smollm_jax.formats import Bundle, from_torch
from smollm_jax.model import SmolLM, rms_norm, rotary_angles
from smollm_jax.train import Compute, mean_loss

Arrays = dict[str, np.ndarray]


@contextmanager
def precisely(dtype: str) -> Iterator[None]:
    """float64 enabled where asked for, and float32 products as exact as float32 allows."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        yield


# ------------------------------------------------------------------------------- residual stream and logits


@functools.partial(jax.jit, static_argnames="dtype")
def _jax_stream(model: SmolLM, tokens: Any, dtype: str) -> tuple[Any, Any]:
    cos, sin = rotary_angles(jnp.arange(tokens.shape[1])[None], model.config, dtype)
    layers, norm = jax.tree.map(lambda p: p.astype(dtype), (model.layers, model.norm[...]))

    def step(x, layer):
        x, _ = layer(x, cos, sin, causal(), None)
        return x, x

    x, stream = jax.lax.scan(step, model.embed_tokens[...][tokens].astype(dtype), layers)
    return stream, model.logits(rms_norm(x, norm, model.config.rms_norm_eps))


def jax_stream(bundle: Bundle, tokens: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The JAX model's residual stream after each layer `[L, B, T, D]`, and its logits `[B, T, V]`."""
    with precisely(dtype):
        stored = "float64" if dtype == "float64" else "float32"
        model = weights.from_bundle(bundle, stored)
        stream, logits = _jax_stream(model, jnp.asarray(tokens), dtype)
        return np.asarray(stream, np.float64), np.asarray(logits)


def torch_stream(module: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of a torch model, the twin or transformers' own, in the precision of its parameters."""
    stream: list[np.ndarray] = []

    def keep(_module, _inputs, output):
        stream.append((output[0] if isinstance(output, tuple) else output).double().numpy())

    hooks = [layer.register_forward_hook(keep) for layer in module.model.layers]
    try:
        with torch.inference_mode():
            out = module(torch.tensor(tokens))
    finally:
        for hook in hooks:
            hook.remove()
    logits = getattr(out, "logits", out)
    return np.stack(stream), logits.to(torch.promote_types(logits.dtype, torch.float32)).numpy()


def layer_errors(stream: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RMS and largest error of a residual stream, per layer `[L]`."""
    error = np.abs(stream - truth)
    return np.sqrt((error**2).mean(axis=(1, 2, 3))), error.max(axis=(1, 2, 3))


def logit_errors(logits: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """RMS and largest error of logits."""
    error = np.abs(logits - truth)
    return float(np.sqrt((error**2).mean())), float(error.max())


# ------------------------------------------------------------------------------------- gradients of the loss


def jax_gradients(bundle: Bundle, tokens: np.ndarray, dtype: str, remat: bool = False) -> tuple[float, Arrays]:
    """Mean next-token loss of `[B, T + 1]` tokens and its gradient, in Hugging Face's names and layout."""
    with precisely(dtype):
        model = weights.from_bundle(bundle, dtype)
        compute = Compute(dtype, remat=remat)
        loss, gradient = jax.jit(jax.value_and_grad(lambda m, t: mean_loss(m, t, compute)))(model, jnp.asarray(tokens))
        arrays = {path: np.asarray(array) for path, array in flatten(gradient).items()}
        return float(loss), weights.to_hf(arrays, bundle.config)


def torch_gradients(module: Any, tokens: np.ndarray) -> tuple[float, Arrays]:
    """The same of a torch model, in the precision of its parameters."""
    module.zero_grad(set_to_none=True)
    inputs = torch.tensor(tokens[:, :-1].astype(np.int64))
    out = module(inputs)
    logits = getattr(out, "logits", out)
    targets = torch.tensor(tokens[:, 1:].astype(np.int64))
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    gradient = {name: from_torch(p.grad.clone()) for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return float(loss.detach()), gradient


def gradient_errors(ours: Arrays, theirs: Arrays) -> dict[str, float]:
    """Per tensor: the norm of the difference over the norm of the second."""
    assert ours.keys() == theirs.keys()
    return {
        name: float(np.linalg.norm((ours[name].astype(np.float64) - theirs[name]).ravel()))
        / float(np.linalg.norm(theirs[name].astype(np.float64).ravel()))
        for name in theirs
    }


# ----------------------------------------------------------------------------------- distributions in bfloat16


def distribution(logits: np.ndarray, truth: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """How far a model's next-token distributions are from the truth's, over `[B, T]` tokens.

    KL(truth || model) in nats a token, summed over the vocabulary; the share of equal argmaxes; perplexity.
    """
    log_p, log_q = (log_softmax(x.astype(np.float64)) for x in (truth, logits))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    chosen = np.take_along_axis(log_q[:, :-1], tokens[:, 1:, None], axis=-1)
    return {
        "kl": float(kl.mean()),
        "argmax": float((truth.argmax(-1) == logits.argmax(-1)).mean()),
        "perplexity": float(np.exp(-chosen.mean())),
    }


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


# ------------------------------------------------------------------------------------------------- generation


def float64_margin(bundle: Bundle, ids: list[int], tokens: tuple[int, int]) -> float:
    """How much the truth prefers the first of two tokens after `ids`, in logits: near 0 either is right."""
    truth = jax_stream(bundle, np.array([ids]), "float64")[1][0, -1]
    return float(truth[tokens[0]] - truth[tokens[1]])


def greedy(step: Callable[[list[int]], np.ndarray], ids: list[int], new_tokens: int, eos: tuple[int, ...]) -> list[int]:
    """Greedy text by repeated whole forward passes: the slow way that every cache must equal."""
    new: list[int] = []
    while len(new) < new_tokens and (not new or new[-1] not in eos):
        new.append(int(step(ids + new).argmax()))
    return new
