"""Each mutant can be planted: its text occurs once, its test exists, and every import of the module gets it."""

import ast
import subprocess
import sys

import pytest

from smollm_parity.mutants import MUTANTS, ROOT, hunt
from smollm_parity.tool_mutants import PACKAGES, Survivor, equivalents


def functions_of(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_there_are_enough_of_them_each_with_a_name_of_its_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 120


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_text_occurs_once_and_becomes_python_and_its_test_is_there(mutant):
    source = (ROOT / f"{mutant.qualified.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    assert mutant.old != mutant.new
    compile(source.replace(mutant.old, mutant.new), mutant.name, "exec")
    path, _, function = mutant.test.partition("::")
    assert (ROOT / path).is_file()
    assert not function or function in functions_of(path)


@pytest.mark.parametrize(
    "name", ["chat protection of the last message only", "the seed ignored from the second epoch on"]
)
def test_a_sample_is_noticed(name):
    """Of the quickest; `make slow` plants five more, `make mutants` all."""
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == name)
    caught, how = hunt(mutant)
    assert caught, how


def test_each_equivalent_mutant_is_of_a_line_that_is_there():
    assert equivalents()
    for mutant in equivalents():
        source = " ".join(line.strip() for line in (ROOT / mutant.file).read_text(encoding="utf-8").splitlines())
        assert mutant.old in source, mutant
        assert mutant.old != mutant.new


def test_files_and_tests_of_each_package_are_there():
    for name, package in PACKAGES.items():
        for pattern in package.files:
            assert list((ROOT / "smollm_jax").glob(pattern)), (name, pattern)
        for path in package.tests:
            assert (ROOT / path).exists(), (name, path)


def test_a_guard_of_lengths_is_told_from_a_change():
    line = "for a, b in zip(x, y, strict=True):"
    for new, alone in {
        "for a, b in zip(x, y, ):": True,
        "for a, b in zip(x, y, strict=None):": True,
        "for a, b in zip(x, y, strict=False):": True,
        "for a, b in zip(x, None, strict=True):": False,
        "for a, b in zip(y, strict=True):": False,
    }.items():
        assert Survivor("x", line, new).changes_a_guard_alone is alone


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
