"""Errors between two backends of the ladder. NumPy only: the report compares arrays that other processes wrote."""

from collections.abc import Mapping

import numpy as np


def layer_errors(stream: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RMS and largest error of a residual stream, per layer `[L]`."""
    error = np.abs(stream - truth)
    return np.sqrt((error**2).mean(axis=(1, 2, 3))), error.max(axis=(1, 2, 3))


def logit_errors(logits: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """RMS and largest error of logits."""
    error = np.abs(logits - truth)
    return float(np.sqrt((error**2).mean())), float(error.max())


def gradient_errors(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """For each tensor the norm of the difference, relative to the norm of `theirs`."""
    assert set(ours) == set(theirs)
    errors = {}
    for name in theirs:
        our_tensor, their_tensor = ours[name].astype(np.float64), theirs[name].astype(np.float64)
        errors[name] = float(np.linalg.norm((our_tensor - their_tensor).ravel()) / np.linalg.norm(their_tensor.ravel()))
    return errors


def distribution(logits: np.ndarray, truth: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """A model's next-token distributions compared with the truth's, over `[B, T]` tokens.

    KL(truth || model) in nats per token, the share of equal argmaxes, and the model's perplexity.
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
