"""Mutants that mutmut makes of the host-side code, package by package, against the tests that the package affects.

    pip install "mutmut>=3.8,<4"
    python -m smollm_parity.tool_mutants                # all packages; hours; exit status 1 below the bar
    python -m smollm_parity.tool_mutants order web      # some of them

mutmut 3 puts all mutants of a file into one module and forks a process for each, after everything is imported: a second
a mutant, where cosmic-ray starts pytest anew for each. It knows which tests reach a function and runs those alone. It
changes no decorated function and nothing outside of functions: `mutant_list` has such.

Mutants that change nothing a caller can see are listed with their reason in `equivalent_mutants.txt`.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from smollm_jax.errors import UsageError
from smollm_jax.runtime.program import run_main

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "mutants"
EQUIVALENTS = Path(__file__).with_name("equivalent_mutants.txt")
COPIED = ("smollm_jax", "smollm_parity", "smollm_torch", "benchmarks", "scripts", "tests", "conftest.py")
BAR = 0.9  # of the mutants of a package that are not equivalent
KILLED = {1, 3, 36, 24, 152, 255, -24}  # pytest failed, or the mutant ran into mutmut's time limit
NO_TESTS = {5, 33}


@dataclasses.dataclass(frozen=True)
class Package:
    """Files below `smollm_jax`, as patterns, and the tests that their mutants may fail."""

    files: tuple[str, ...]
    tests: tuple[str, ...]


PACKAGES = {
    "order": Package(
        ("data/shuffle.py", "data/batches.py", "data/mixture.py", "finetuning/batches.py"),
        ("tests/data/test_shuffle.py", "tests/data/test_batches.py", "tests/data/test_data.py"),
    ),
    "packing": Package(
        ("data/examples/packing.py",), ("tests/data/examples/test_examples.py", "tests/data/test_batches.py")
    ),
    "data": Package(("data/*.py", "data/examples/*.py"), ("tests/data",)),
    "tokenizer": Package(("tokenizer/*.py",), ("tests/tokenizer", "tests/data/examples")),
    "sampling": Package(("generation/sampling.py",), ("tests/generation/test_sampling.py",)),
    "engine": Package(("generation/engine.py",), ("tests/generation/test_engine.py",)),
    "checkpoint": Package(
        ("runs/checkpoint.py", "runs/manifest.py", "runs/provenance.py"),
        ("tests/runs", "tests/training/test_resume.py", "tests/weights/test_weights.py"),
    ),
    "files": Package(
        ("runtime/files.py", "runtime/atomic.py", "runtime/gguf_header.py"),
        ("tests/test_hostile_files.py", "tests/weights/test_conversion_edges.py", "tests/config/test_config.py"),
    ),
    "web": Package(
        ("web/*.py",),
        ("tests/web/test_middleware.py", "tests/web/test_escaping.py", "tests/web/test_web_parts.py"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Survivor:
    """A mutant that no test failed: its file, and the lines that it changes."""

    file: str
    old: str
    new: str

    @property
    def changes_a_guard_alone(self) -> bool:
        """Whether only the `strict` of a zip differs, whose lengths are equal by construction."""
        strict = r", (strict=\w+)?(?=\))"
        return re.sub(strict, "", self.old) == re.sub(strict, "", self.new)


def equivalents() -> set[Survivor]:
    """The mutants that are known to change nothing."""
    known = set()
    for block in EQUIVALENTS.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        if lines:
            file, old, new, _ = lines
            known.add(Survivor(file, old.removeprefix("- "), new.removeprefix("+ ")))
    return known


def prepare(name: str, package: Package) -> Path:
    """A copy of the checkout in which mutmut works; results of an earlier run stay for files that have not changed."""
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    for copied in COPIED:
        source, target = ROOT / copied, folder / copied
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    shutil.copy2(ROOT / "pyproject.toml", folder)
    for place in (folder, folder / "mutants"):  # mutmut would copy what is linked
        place.mkdir(exist_ok=True)
        if not (place / "assets").exists():
            (place / "assets").symlink_to((ROOT / "assets").resolve())
    options = {
        "source_paths": ["smollm_jax"],
        "only_mutate": [f"smollm_jax/{pattern}" for pattern in package.files],
        "also_copy": list(COPIED),
        "pytest_add_cli_args_test_selection": list(package.tests),
        "pytest_add_cli_args": ["-m", "not slow and not overnight", "-p", "no:cacheprovider"],
    }
    lines = [f"{name}=\n" + "".join(f"    {value}\n" for value in values) for name, values in options.items()]
    (folder / "setup.cfg").write_text("[mutmut]\n" + "".join(lines), encoding="utf-8")
    return folder


def survivor(folder: Path, mutant: str) -> Survivor:
    """The file and the lines of a mutant, from mutmut's own diff."""
    command = [sys.executable, "-m", "mutmut", "show", mutant]
    shown = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()
    file = next(line.removeprefix("--- ") for line in shown if line.startswith("--- "))
    old, new = (
        " ".join(line[1:].strip() for line in shown if line.startswith(sign) and not line.startswith(sign * 3))
        for sign in "-+"
    )
    return Survivor(file, old, new)


def hunt(name: str, package: Package) -> bool:
    """Runs the mutants of a package and prints the survivors and the share killed; whether that is enough."""
    folder = prepare(name, package)
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(len(os.sched_getaffinity(0)))]
    done = subprocess.run(command, cwd=folder, check=False)
    if done.returncode:
        raise UsageError(f"{folder}: mutmut ended with status {done.returncode}")
    codes = {}
    for path in (folder / "mutants/smollm_jax").rglob("*.meta"):
        codes |= json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
    known, counts = equivalents(), Counter()
    for mutant, code in sorted(codes.items()):
        if code in KILLED:
            counts["killed"] += 1
            continue
        alive = survivor(folder, mutant)
        if alive in known or alive.changes_a_guard_alone:
            counts["equivalent"] += 1
            continue
        counts["no test"] += code in NO_TESTS
        counts["survived"] += 1
        print(f"{'NO TEST ' if code in NO_TESTS else 'SURVIVES'}  {alive.file}: {alive.old} -> {alive.new}", flush=True)
    judged = counts["killed"] + counts["survived"]
    print(
        f"{name}: {counts['killed']} of {judged} mutants killed, {counts['killed'] / max(judged, 1):.1%}; "
        f"{counts['no test']} are reached by no test, {counts['equivalent']} are equivalent",
        flush=True,
    )
    return counts["killed"] >= BAR * judged


def main() -> None:
    if not (ROOT / "tests").is_dir():
        raise UsageError(f"mutants need the tests of a checkout, but {ROOT} has no tests folder")
    if unknown := [name for name in sys.argv[1:] if name not in PACKAGES]:
        raise UsageError(f"{unknown[0]}: no such package, known: {', '.join(PACKAGES)}")
    enough = [hunt(name, PACKAGES[name]) for name in sys.argv[1:] or PACKAGES]
    sys.exit(0 if all(enough) else 1)


if __name__ == "__main__":
    run_main(main)
