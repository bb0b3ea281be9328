"""How far two backends of the ladder are apart. NumPy only: the report compares what other processes measured."""

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
    """Per tensor: the norm of the difference over the norm of the second."""
    assert set(ours) == set(theirs)
    errors = {}
    for name in theirs:
        mine, other = ours[name].astype(np.float64), theirs[name].astype(np.float64)
        errors[name] = float(np.linalg.norm((mine - other).ravel()) / np.linalg.norm(other.ravel()))
    return errors


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
