"""The tests notice bugs: each mutant makes its named test fail. A few in `make slow`, all of them in `make parity`.

`tests/test_mutants.py` checks that each can be planted.
"""

import pytest

from smollm_parity.mutants import MUTANTS, hunt

FEW = {"rotary interleaved", "k and v swapped", "cache written one slot late", "labels shifted twice", "beta2 0.999"}


def test_the_few_are_among_them():
    assert {mutant.name for mutant in MUTANTS} > FEW


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, id=m.name, marks=pytest.mark.slow if m.name in FEW else pytest.mark.overnight) for m in MUTANTS],
)
def test_the_mutant_is_caught(mutant):
    caught, how = hunt(mutant)
    print(f"{mutant.name}: {how}")
    assert caught, f"{mutant.name} survives {mutant.test}: {how}"
