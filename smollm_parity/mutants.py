"""Deliberate, realistic bugs in the JAX code; for each a named fast test must fail.

    python -m smollm_parity.mutants            # all of them; exit status 1 if one survives
    python -m smollm_parity.mutants gelu       # those whose name contains a word

A mutant of `mutant_list` is one replacement in one module's source, made when the module is imported (`conftest.py`),
in its own process. It needs a checkout: an installed package has no tests.
"""

import concurrent.futures
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import CodeType

from smollm_jax.errors import UsageError
from smollm_jax.runtime.program import run_main
from smollm_parity.mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent


class _MutatedLoader(importlib.machinery.SourceFileLoader):
    """Compiles a module's source after the replacement, without reading or writing bytecode."""

    def __init__(self, fullname: str, path: str, mutant: Mutant) -> None:
        super().__init__(fullname, path)
        self.mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path).decode("utf-8")
        count = source.count(self.mutant.old)
        assert count == 1, f"mutant {self.mutant.name!r}: its text occurs {count} times"
        return self.source_to_code(source.replace(self.mutant.old, self.mutant.new).encode("utf-8"), self.path)


class _MutatedFinder(importlib.abc.MetaPathFinder):
    """Finds one module and gives it the mutating loader."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, fullname, path, target=None):
        if fullname != self.mutant.qualified:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _MutatedLoader(fullname, spec.origin, self.mutant)
        return spec


def apply(name: str) -> None:
    """Imports the mutated module in place of the real one; for `conftest.py`, before anything else imports it.

    A finder is needed because importing `smollm_jax.config.model` first imports `smollm_jax.config`, whose `__init__`
    imports `Config` from that module: it must get the mutant's too.
    """
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == name)
    assert mutant.qualified not in sys.modules, f"{mutant.qualified} is imported already"
    finder = _MutatedFinder(mutant)
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module(mutant.qualified)
    finally:
        sys.meta_path.remove(finder)


def hunt(mutant: Mutant) -> tuple[bool, str]:
    """Whether the mutant's test failed, and how: the largest measured margin, or the line that failed."""
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "measured.jsonl"
        environment = os.environ | {"SMOLLM_MUTANT": mutant.name, "SMOLLM_MEASURED": str(measured)}
        # --maxfail: several failures, for the largest margin of them
        command = [sys.executable, "-m", "pytest", "-m", "not overnight", "-p", "no:cacheprovider", "--maxfail=4"]
        result = subprocess.run(
            [*command, mutant.test], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        rows = [json.loads(line) for line in measured.read_text().splitlines()] if measured.exists() else []
    # Status 1: tests ran and some failed. An error before the test does not count.
    caught = (
        result.returncode == 1 and bool(re.search(r"\d+ failed", result.stdout)) and "\nERROR " not in result.stdout
    )
    margins = [row["measured"] / row["bound"] for row in rows if row["bound"] and not row["measured"] <= row["bound"]]
    if margins:
        return caught, f"{max(margins):.1e} times the bound"
    lines = [line[1:].strip() for line in result.stdout.splitlines() if line.startswith("E  ")]
    return caught, lines[0][:90] if lines else (result.stdout + result.stderr).strip()[-300:]


def main() -> None:
    if not (ROOT / "parity_tests").is_dir():
        raise UsageError(f"mutants need the tests of a checkout, but {ROOT} has no parity_tests folder")
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.name for word in sys.argv[1:])]
    survivors = []
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for mutant, (caught, how) in zip(chosen, pool.map(hunt, chosen), strict=True):
            print(f"{'dead    ' if caught else 'SURVIVES'}  {mutant.name}  [{mutant.test}]  {how}", flush=True)
            survivors += [] if caught else [mutant.name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    run_main(main)
