"""Each mutant can be planted: its text occurs once, its test exists, and every import of the module gets it."""

import ast
import subprocess
import sys

import pytest

from smollm_parity.mutants import MUTANTS, ROOT


def functions_of(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_there_are_enough_of_them_each_with_a_name_of_its_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 25


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_text_occurs_once_and_its_test_is_there(mutant):
    source = (ROOT / f"{mutant.qualified.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    assert mutant.old != mutant.new
    path, _, function = mutant.test.partition("::")
    assert (ROOT / path).is_file()
    assert not function or function in functions_of(path)


IMPORTERS = """
import importlib, sys
from smollm_parity import mutants
mutants.apply({name!r})
mutated = importlib.import_module({qualified!r})
assert mutated.__spec__.loader.mutant.name == {name!r}
for module in {importers!r}:
    for name, value in vars(importlib.import_module(module)).items():
        if getattr(value, "__module__", None) == {qualified!r}:
            assert value is getattr(mutated, name), (module, name)
            print(module)
"""


@pytest.mark.parametrize(
    ("name", "importers"),
    [
        ("theta 10,000 for 100,000", ["smollm_jax.config", "smollm_jax.config.presets"]),
        ("o_proj transposed", ["smollm_jax.weights.convert", "smollm_jax.weights.jax_model"]),
    ],
)
def test_whoever_imports_from_the_module_gets_the_mutant(name, importers):
    """Also from the package's `__init__`, which runs before the module itself is imported."""
    (qualified,) = (mutant.qualified for mutant in MUTANTS if mutant.name == name)
    program = IMPORTERS.format(name=name, qualified=qualified, importers=importers)
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) == set(importers)
