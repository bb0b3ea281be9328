"""Imports point down: each package imports only itself and packages of lower floors."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = (
    "errors",
    "runtime parallel",
    "config tokenizer",
    "runs model data",
    "weights",
    "generation smollm_torch",
    "training evaluation web",
    "finetuning serve",
    "commands",
    "smollm_parity benchmarks",
    "scripts",
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}


def package_of(module: str) -> str:
    """The package as FLOORS names it: "model" for smollm_jax.model.ops, "" for smollm_jax itself."""
    top, _, submodule = module.partition(".")
    return submodule.partition(".")[0] if top == "smollm_jax" else top


def imports_of(path: Path) -> set[str]:
    """Every module of ours that a file imports, at module level or in a function."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            face = node.module == "smollm_jax"
            modules |= {f"smollm_jax.{alias.name}" for alias in node.names} if face else {node.module}
    return {module for module in modules if package_of(module) in FLOOR}


def test_imports_point_down():
    faults, seen = [], set()
    for folder in ("smollm_jax", "smollm_torch", "smollm_parity", "benchmarks", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            mine = package_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
            if mine == "__init__":
                mine = "errors"  # the package itself imports nothing
            assert mine in FLOOR, f"{path.relative_to(ROOT)} has no floor"
            seen.add(mine)
            for module in imports_of(path):
                other = package_of(module)
                if other != mine and FLOOR[other] >= FLOOR[mine]:
                    faults.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not faults, "\n".join(faults)
    assert seen == set(FLOOR), "a package of the list is gone"
