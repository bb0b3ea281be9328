"""Sampling the next token of every row from its logits: the user's parameters, and the program that applies them.

The parameters are arrays over the rows, not constants, so that changing them does not recompile.

B rows, V vocab.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from smollm_jax.errors import UsageError, short_repr

INT32_MAX = 2**31 - 1  # any larger top_k keeps all tokens as well
INFINITY_BITS = 0x7F800000  # of a float32
ALLOWED = {
    "temperature": (lambda x: x >= 0, "at least 0"),
    "top_k": (lambda x: x >= 0, "at least 0"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "repetition_penalty": (lambda x: 1e-6 <= x <= 1e6, "at least 1e-6 and at most 1e6"),  # float32 logits stay finite
    "seed": (lambda x: 0 <= x < 2**32, "at least 0 and below 2**32"),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy at temperature 0, else sampled from the filtered distribution.

    The order is transformers': penalty, temperature, top_k, top_p of what top_k kept, min_p. Raises `UsageError`
    that names an invalid field.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # keeps the likeliest tokens up to this total probability, including the one that reaches it
    min_p: float = 0.0  # keeps tokens with at least this fraction of the largest probability
    repetition_penalty: float = 1.0  # divides positive logits of tokens in prompt or text, multiplies negative ones
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (is_allowed, requirement) in ALLOWED.items():
            value = getattr(self, name)
            is_integer = name in ("top_k", "seed")
            types = (int, np.integer) if is_integer else (int, float, np.integer, np.floating)
            if not isinstance(value, types) or isinstance(value, bool):
                raise UsageError(
                    f"{name} must be {'an integer' if is_integer else 'a number'}, got {short_repr(value)}"
                )
            if not (is_allowed(value) and value < float("inf")):
                finite = "" if is_integer else " and finite"
                raise UsageError(f"{name} must be {requirement}{finite}, got {short_repr(value)}")

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is the argmax of the raw logits."""
        return self.temperature == 0 and self.repetition_penalty == 1


GREEDY = Sampling()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchedSampling:
    """The fields of `Sampling` as arrays over the rows."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]
    seed: UInt[Array, "B"]

    @classmethod
    def stack(cls, rows: Sequence[Sampling]) -> "BatchedSampling":
        """One entry per row; numbers beyond the dtype's range become its largest."""

        def column(name: str, dtype: Any) -> Array:
            return jnp.asarray(np.array([min(getattr(row, name), limits[dtype]) for row in rows], dtype))

        limits = {np.float32: float(np.finfo(np.float32).max), np.int32: INT32_MAX, np.uint32: 2**32 - 1}
        dtypes = {"top_k": np.int32, "seed": np.uint32}
        return cls(**{name: column(name, dtypes.get(name, np.float32)) for name in ALLOWED})


def sample(
    logits: Float[Array, "B V"], sampling: BatchedSampling, count: Int[Array, "B"], seen: Bool[Array, "B V"]
) -> Int[Array, "B"]:
    """A token id per row. The noise of row b depends only on its seed and `count[b]`, not on the other rows."""
    logits = apply_repetition_penalty(logits, seen, sampling.repetition_penalty)
    greedy = sampling.temperature == 0
    # The maximum is subtracted first, so that a temperature near 0 gives 0 and -inf, never NaN.
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = shifted / jnp.where(greedy, 1, sampling.temperature)[:, None]

    def gumbel(seed, count):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), count), logits.shape[-1:], logits.dtype)

    noise = jnp.where(greedy[:, None], 0, jax.vmap(gumbel)(sampling.seed, count))
    mask = filter_mask(scaled, sampling)
    return jnp.argmax(jnp.where(mask, scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)


def apply_repetition_penalty(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Logits with those of seen tokens divided (positive) or multiplied (negative) by the row's penalty.

    Source: Keskar et al. 2019 (CTRL), section 4.1; transformers, RepetitionPenaltyLogitsProcessor.
    """
    penalty = penalty[:, None].astype(logits.dtype)
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_mask(scaled: Float[Array, "B V"], sampling: BatchedSampling) -> Bool[Array, "B V"]:
    """The tokens that top_k, top_p and min_p keep. `scaled` logits are at most 0; ties at a cut-off are kept.

    Sources: Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p).
    """
    V = scaled.shape[-1]
    relative = jnp.exp(scaled)  # probability relative to the largest
    k = jnp.where(sampling.top_k == 0, V, sampling.top_k)
    top_k = _smallest_sufficient_set(scaled, k < V, lambda mask: mask.sum(axis=-1) >= k)
    mass = jnp.where(top_k, relative, 0)
    target = sampling.top_p * mass.sum(axis=-1)
    top_p = _smallest_sufficient_set(
        scaled, sampling.top_p < 1, lambda mask: jnp.where(mask, mass, 0).sum(axis=-1) >= target
    )
    return top_k & top_p & (relative >= sampling.min_p[:, None])


def _smallest_sufficient_set(
    scaled: Float[Array, "B V"], active: Bool[Array, "B"], is_sufficient: Callable[[Array], Array]
) -> Bool[Array, "B V"]:
    """A mask of the fewest likeliest tokens that satisfy `is_sufficient`, in `active` rows; all tokens in the others.

    By bisection over the threshold -scaled: the bits of a float32 >= 0 have the same order as integers, so 31 steps
    find it exactly. XLA's sort of 49,152 numbers takes 20 times as long on a CPU.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(scaled).astype(jnp.float32), jnp.int32)

    def bisect(_, bounds):
        low, high = bounds  # insufficient, sufficient
        middle = low + (high - low) // 2
        sufficient = is_sufficient(bits <= middle[:, None])
        return jnp.where(sufficient, low, middle), jnp.where(sufficient, middle, high)

    def search():
        rows = active.shape
        _, threshold = jax.lax.fori_loop(0, 31, bisect, (jnp.full(rows, -1), jnp.full(rows, INFINITY_BITS)))
        return (bits <= threshold[:, None]) | ~active[:, None]

    return jax.lax.cond(active.any(), search, lambda: jnp.ones_like(scaled, bool))
