"""Prepared data sets, alone or mixed by weight, and the source of each training window. Imports no framework."""

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
from smollm_jax.data.prepare import cached_dataset
from smollm_jax.data.token_file import MANIFEST, TokenSet
from smollm_jax.errors import UsageError
from smollm_jax.runtime.signals import StopSignal
from smollm_jax.tokenizer import Tokenizer

MAX_PERIOD = 1_000_000  # windows


class Interleaver:
    """Assigns each window of a mixture to a source and to an index among that source's windows.

    Each source gets its exact share of every `period` windows, and its share give or take one window of any first n.
    """

    def __init__(self, shares: Sequence[Fraction]):
        self.period = math.lcm(*(share.denominator for share in shares))
        if self.period > MAX_PERIOD:
            raise UsageError(
                f"--data: these weights repeat only every {self.period:,} windows, at most {MAX_PERIOD:,} are allowed: "
                "round the weights"
            )
        self.counts = np.array([int(share * self.period) for share in shares])
        self._source = np.array(_schedule(self.counts.tolist()), np.int32)
        self._index = np.empty(self.period, np.int64)
        for source, count in enumerate(self.counts):
            self._index[self._source == source] = np.arange(count)

    def __call__(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each of these windows, and its index among the windows of that source."""
        period, slot = np.divmod(windows, self.period)
        sources = self._source[slot]
        return sources, period * self.counts[sources] + self._index[slot]


def _schedule(counts: list[int]) -> list[int]:
    """The source of each of `sum(counts)` slots: of the first n, source i has its share give or take 1.

    Each slot goes to the source with the earliest deadline among those that are not ahead of their share.
    Source: Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980.
    """
    if len(counts) == 1:
        return [0] * counts[0]
    period, scale = sum(counts), 2 * len(counts) - 2  # times and deadlines are integers in units of 1 / scale
    multiple = math.lcm(*counts)
    intervals = [scale * (multiple // count) for count in counts]
    deadlines = [interval - interval // scale for interval in intervals]
    assigned, schedule = [0] * len(counts), []
    for slot in range(1, period + 1):
        eligible = (i for i, n in enumerate(assigned) if scale * (counts[i] * slot - period * n) >= period)
        source = min(eligible, key=deadlines.__getitem__)
        assigned[source] += 1
        deadlines[source] += intervals[source]
        schedule.append(source)
    return schedule


ORDER = "feistel-1"  # names the algorithm that orders the windows; part of the identity of the data


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The data of a run: sources of one or more sets each, and the share of the windows that comes from each source."""

    sources: tuple[tuple[TokenSet, ...], ...]
    shares: tuple[Fraction, ...] = (Fraction(1),)
    vocab_size: int = 1 << 16  # all token ids are below it

    @property
    def sets(self) -> list[TokenSet]:
        """All sets, in order."""
        return [token_set for source in self.sources for token_set in source]

    @property
    def tokens(self) -> int:
        """The number of tokens of all sets."""
        return sum(token_set.tokens for token_set in self.sets)

    @property
    def documents(self) -> int:
        """The number of documents of all sets."""
        return sum(token_set.documents for token_set in self.sets)

    @property
    def location(self) -> str:
        """The folders of the sets, and the command that verifies those too large to be hashed when opened."""
        folders = ", ".join(str(token_set.path) for token_set in self.sets)
        unverified = " ".join(str(token_set.path) for token_set in self.sets if not token_set.verified)
        return folders + (f"; to check every byte: prepare_data.py --verify {unverified}" if unverified else "")

    @property
    def tokenizer_sha256(self) -> str:
        """The hash of the tokenizer, which is the same for all sets."""
        return self.sets[0].files[0].tokenizer_sha256

    @functools.cached_property
    def sha256(self) -> str:
        """A hash of the files, the shares and the algorithm that orders the windows."""
        digests = [[file.sha256 for token_set in source for file in token_set.files] for source in self.sources]
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
    """The data of sources, each PATH or PATH:WEIGHT; without weights, all paths together are one source.

    A path is a prepared set or token file, or a source of text as `scripts/prepare_data.py` takes it, which is
    prepared once and cached under `cache` by the hash of its content and of the tokenizer. `on_bad_text` and
    `special_tokens` apply to text; raises `UsageError` for a set that was prepared without the requested
    `special_tokens`.
    """
    paths, shares = parse_sources([sources] if isinstance(sources, (str, Path)) else sources)
    tokenizer = tokenizer or Tokenizer.load(tokenizer_folder)
    settings = Settings(tokenizer_folder, on_bad_text=on_bad_text, special_tokens=special_tokens)
    sets = []
    for path in paths:
        path = path.parent if path.name == "tokens.bin" else path
        is_prepared = any((path / name).is_file() for name in (MANIFEST, "tokens.json"))
        sets.append(TokenSet.open(path if is_prepared else cached_dataset(path, settings, cache, stop, tokenizer)))
        if special_tokens and not sets[-1].special_tokens:
            advice = "prepare it again with that flag, or train without it"
            raise UsageError(f"{path}: was prepared without --special-tokens: {advice}")
        for file in sets[-1].files:
            file.check(tokenizer, tokenizer_folder, tokenizer.sha256)
    if shares is None:
        return Mixture((tuple(sets),), vocab_size=tokenizer.vocab_size)
    return Mixture(tuple((token_set,) for token_set in sets), shares, tokenizer.vocab_size)


def parse_sources(sources: Sequence[str | Path]) -> tuple[list[Path], tuple[Fraction, ...] | None]:
    """The paths of sources, each PATH or PATH:WEIGHT, and their shares, which sum to 1; None without weights.

    Raises `UsageError` for a weight that is not above 0, and if only some sources have one.
    """
    weighted = [parse_source(str(source)) for source in sources]
    weights = [weight for _, weight in weighted if weight is not None]
    if not weighted or (weights and len(weights) != len(weighted)):
        raise UsageError("--data: give a weight to every source or to none: PATH:WEIGHT")
    paths = [path for path, _ in weighted]
    return paths, tuple(weight / sum(weights) for weight in weights) if weights else None


NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf|nan"  # what is meant as a weight, in whatever spelling


def parse_source(source: str) -> tuple[Path, Fraction | None]:
    """The path and the weight of PATH:WEIGHT, the weight as an exact decimal; None without a weight.

    Raises `UsageError` for a number that is no decimal above 0.
    """
    path, colon, weight = source.rpartition(":")
    if not colon or not re.fullmatch(NUMBER, weight, re.IGNORECASE):
        return Path(source), None
    if not re.fullmatch(r"\d+(\.\d+)?", weight) or not Fraction(weight):
        raise UsageError(f"--data {source}: a weight must be above 0, a decimal such as 0.7")
    return Path(path), Fraction(weight)
