"""The tests notice bugs: each mutant is caught by its named test. A few here, all of them in `make parity`."""

import pytest

from smollm_parity.mutants import MUTANTS, ROOT, hunt

FEW = {"rotary interleaved", "k and v swapped", "cache written one slot late", "labels shifted twice", "beta2 0.999"}


def test_there_are_enough_of_them_and_each_can_be_planted():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 25
    assert {mutant.name for mutant in MUTANTS} > FEW
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "smollm_jax").glob("*.py")}
    assert [mutant.name for mutant in MUTANTS if sources[mutant.module].count(mutant.old) != 1] == []


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, id=m.name, marks=[] if m.name in FEW else pytest.mark.slow) for m in MUTANTS],
)
def test_the_mutant_is_caught(mutant):
    caught, how = hunt(mutant)
    print(f"{mutant.name}: {how}")
    assert caught, f"{mutant.name} survives {mutant.test}: {how}"
