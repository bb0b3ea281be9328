"""The next token of every row, chosen from its logits: what a user may ask for, and the program that does it.

Every number is one of an array over the rows, so that none of them costs another compilation.

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

LARGEST = 2**31 - 1  # of an int32; any larger top_k keeps all as well
INFINITY = 0x7F800000  # its bits as float32
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
    """How the next token is chosen: greedy at temperature 0, else drawn from the kept part of the distribution.

    The order is transformers': penalty, temperature, top_k, top_p of what top_k kept, min_p. Raises `UsageError`
    naming the field that makes no sense.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # keeps the likeliest tokens up to this total, the one that crosses it too
    min_p: float = 0.0  # keeps tokens with at least this part of the likeliest one's probability
    repetition_penalty: float = 1.0  # divides positive logits of tokens in prompt or text, multiplies negative ones
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (allowed, words) in ALLOWED.items():
            value = getattr(self, name)
            whole = name in ("top_k", "seed")
            right = isinstance(value, (int, np.integer) if whole else (int, float, np.integer, np.floating))
            if not right or isinstance(value, bool):
                raise UsageError(f"{name} must be {'an integer' if whole else 'a number'}, got {short_repr(value)}")
            if not (allowed(value) and value < float("inf")):
                raise UsageError(f"{name} must be {words}{'' if whole else ' and finite'}, got {short_repr(value)}")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token of the bare logits is taken."""
        return self.temperature == 0 and self.repetition_penalty == 1


GREEDY = Sampling()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knobs:
    """The fields of `Sampling` of every row, as a program takes them."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]
    seed: UInt[Array, "B"]

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> "Knobs":
        """One entry a row."""

        def column(name: str, dtype: Any) -> Array:
            return jnp.asarray(np.array([min(getattr(row, name), limits[dtype]) for row in rows], dtype))

        limits = {np.float32: float(np.finfo(np.float32).max), np.int32: LARGEST, np.uint32: 2**32 - 1}
        kinds = {"top_k": np.int32, "seed": np.uint32}
        return cls(**{name: column(name, kinds.get(name, np.float32)) for name in ALLOWED})


def choose(
    logits: Float[Array, "B V"], knobs: Knobs, count: Int[Array, "B"], seen: Bool[Array, "B V"]
) -> Int[Array, "B"]:
    """A token id a row. Row b's noise comes from its own seed and `count[b]`, so no other row can change its text."""
    logits = penalized(logits, seen, knobs.repetition_penalty)
    greedy = knobs.temperature == 0
    # Below the largest, so that a temperature near 0 gives -inf and never NaN; the largest stays at 0.
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = below / jnp.where(greedy, 1, knobs.temperature)[:, None]

    def gumbel(seed, count):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), count), logits.shape[-1:], logits.dtype)

    noise = jnp.where(greedy[:, None], 0, jax.vmap(gumbel)(knobs.seed, count))
    return jnp.argmax(jnp.where(kept(scaled, knobs), scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)


def penalized(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Logits with those of seen tokens divided (positive) or multiplied (negative) by the row's penalty.

    Source: Keskar et al. 2019 (CTRL), section 4.1; transformers, RepetitionPenaltyLogitsProcessor.
    """
    penalty = penalty[:, None].astype(logits.dtype)
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def kept(scaled: Float[Array, "B V"], knobs: Knobs) -> Bool[Array, "B V"]:
    """Which tokens may be drawn. `scaled` is at most 0; tokens as likely as the last one kept are kept too.

    Sources: Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p).
    """
    V = scaled.shape[-1]
    likelihood = jnp.exp(scaled)  # over that of the likeliest token
    wanted = jnp.where(knobs.top_k == 0, V, knobs.top_k)
    counted = _deepest(scaled, wanted < V, lambda inside: inside.sum(axis=-1) >= wanted)
    mass = jnp.where(counted, likelihood, 0)
    total = knobs.top_p * mass.sum(axis=-1)
    nucleus = _deepest(scaled, knobs.top_p < 1, lambda inside: jnp.where(inside, mass, 0).sum(axis=-1) >= total)
    return counted & nucleus & (likelihood >= knobs.min_p[:, None])


def _deepest(
    scaled: Float[Array, "B V"], cuts: Bool[Array, "B"], enough: Callable[[Array], Array]
) -> Bool[Array, "B V"]:
    """The smallest set of likeliest tokens that is `enough`, for rows where `cuts`; all tokens for the others.

    Found by bisection: a depth is a float32 of at least 0, whose bits as an integer keep its order, so 31 halvings
    find the exact one. On a CPU XLA's sort of 49,152 numbers takes 20 times as long.
    """
    depth = jax.lax.bitcast_convert_type(jnp.abs(scaled).astype(jnp.float32), jnp.int32)

    def halve(_, ends):
        low, high = ends  # too shallow, enough
        middle = low + (high - low) // 2
        reached = enough(depth <= middle[:, None])
        return jnp.where(reached, low, middle), jnp.where(reached, middle, high)

    def search():
        rows = cuts.shape
        _, deepest = jax.lax.fori_loop(0, 31, halve, (jnp.full(rows, -1), jnp.full(rows, INFINITY)))
        return (depth <= deepest[:, None]) | ~cuts[:, None]

    return jax.lax.cond(cuts.any(), search, lambda: jnp.ones_like(scaled, bool))
