"""Prepared data sets, alone or mixed by weight, and which of them each window comes from. Imports no framework."""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from smollm_jax.data.bad_text import Policy
from smollm_jax.data.plan import Settings
from smollm_jax.data.prepare import prepared
from smollm_jax.data.token_file import MANIFEST, TokenSet
from smollm_jax.errors import UsageError
from smollm_jax.runtime.signals import StopSignal
from smollm_jax.tokenizer import Tokenizer

LONGEST_PERIOD = 1_000_000


class Turns:
    """Which source each window of a mixture comes from, and which of that source's windows it is.

    Exact over every `period` windows, and within one window of the shares after any number of them.
    """

    def __init__(self, shares: Sequence[Fraction]):
        self.period = math.lcm(*(share.denominator for share in shares))
        if self.period > LONGEST_PERIOD:
            raise UsageError(f"the weights come out even after {self.period:,} windows only, at most 1,000,000: round")
        self.counts = np.array([int(share * self.period) for share in shares])
        self._table = np.array(_fair(self.counts.tolist()), np.int32)
        self._rank = np.empty(self.period, np.int64)
        for source, count in enumerate(self.counts):
            self._rank[self._table == source] = np.arange(count)

    def __call__(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sources of these windows of the mixture, and the numbers of the windows there."""
        period, place = np.divmod(windows, self.period)
        sources = self._table[place]
        return sources, period * self.counts[sources] + self._rank[place]


def _fair(counts: list[int]) -> list[int]:
    """A turn for each of `sum(counts)` places: after n, source i had n * counts[i] / sum(counts) turns, give or take 1.

    Source: Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980: of the sources that are not too
    early, the one whose deadline is first.
    """
    if len(counts) == 1:
        return [0] * counts[0]
    period, twice = sum(counts), 2 * len(counts) - 2
    whole = math.lcm(*counts)
    paces = [twice * (whole // count) for count in counts]
    deadlines = [pace - pace // twice for pace in paces]
    given, turns = [0] * len(counts), []
    for place in range(1, period + 1):
        ready = (i for i, n in enumerate(given) if twice * (counts[i] * place - period * n) >= period)
        chosen = min(ready, key=deadlines.__getitem__)
        given[chosen] += 1
        deadlines[chosen] += paces[chosen]
        turns.append(chosen)
    return turns


ORDER = "feistel-1"  # names the order of the windows: another one is other data


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What a run trains on: sources, each one or more sets, and the share of all windows that comes from each."""

    sources: tuple[tuple[TokenSet, ...], ...]
    shares: tuple[Fraction, ...] = (Fraction(1),)
    vocab_size: int = 1 << 16  # no token may be as large

    @property
    def sets(self) -> list[TokenSet]:
        """All sets, in order."""
        return [one for source in self.sources for one in source]

    @property
    def tokens(self) -> int:
        """How many, in all sets."""
        return sum(one.tokens for one in self.sets)

    @property
    def documents(self) -> int:
        """How many, in all sets."""
        return sum(one.documents for one in self.sets)

    @property
    def places(self) -> str:
        """Where they lie, and of what is too large to have been read how to verify it."""
        named = ", ".join(str(one.path) for one in self.sets)
        unread = " ".join(str(one.path) for one in self.sets if not one.verified)
        return named + (f"; every byte checked by: prepare_data.py --verify {unread}" if unread else "")

    @property
    def tokenizer_sha256(self) -> str:
        """Of the one tokenizer that made them all."""
        return self.sets[0].files[0].tokenizer_sha256

    @functools.cached_property
    def sha256(self) -> str:
        """The identity of the data and of the order it is read in."""
        digests = [[file.sha256 for one in source for file in one.files] for source in self.sources]
        content = [ORDER, digests, [str(share) for share in self.shares]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def open_mixture(
    sources: Path | Sequence[str | Path],
    tokenizer_folder: Path,
    cache: Path,
    stop: StopSignal | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    on_bad_text: Policy = "stop",
    special_tokens: bool = False,
) -> Mixture:
    """The data that sources name, each PATH or PATH:WEIGHT; without weights, one source of all of them.

    A path is a prepared set or token file, or a source of text as `scripts/prepare_data.py` takes it, which is
    prepared once and kept under `cache`, by the hash of its content and of the tokenizer. The last two are how text is
    read; raises `UsageError` for a set that was prepared without the special tokens that are asked for.
    """
    named = [_weighted(str(s)) for s in ([sources] if isinstance(sources, (str, Path)) else sources)]
    weights = [weight for _, weight in named if weight is not None]
    if not named or (weights and len(weights) != len(named)):
        raise UsageError("data: give a weight to every source or to none: PATH:WEIGHT")
    tokenizer = tokenizer or Tokenizer.load(tokenizer_folder)
    settings = Settings(tokenizer_folder, on_bad_text=on_bad_text, special_tokens=special_tokens)
    sets = []
    for path, _ in named:
        path = path.parent if path.name == "tokens.bin" else path
        whole = any((path / name).is_file() for name in (MANIFEST, "tokens.json"))
        sets.append(TokenSet.open(path if whole else prepared(path, settings, cache, stop, tokenizer)))
        if special_tokens and not sets[-1].special_tokens:
            again = "leave --special-tokens out, or prepare it again with it"
            raise UsageError(f"{path}: was prepared without --special-tokens: {again}")
        for file in sets[-1].files:
            file.check(tokenizer, tokenizer_folder, tokenizer.sha256)
    if not weights:
        return Mixture((tuple(sets),), vocab_size=tokenizer.vocab_size)
    shares = tuple(weight / sum(weights) for weight in weights)
    return Mixture(tuple((one,) for one in sets), shares, tokenizer.vocab_size)


def _weighted(source: str) -> tuple[Path, Fraction | None]:
    """The path and the weight of PATH:WEIGHT; the weight is the decimal number as it is written."""
    path, colon, weight = source.rpartition(":")
    if not colon or not re.fullmatch(r"\d+(\.\d+)?", weight):
        return Path(source), None
    if not Fraction(weight):
        raise UsageError(f"data: {source}: a weight must be above 0")
    return Path(path), Fraction(weight)
