"""The console command: `smollm VERB` runs what `python scripts/NAME.py` runs in a checkout."""

import ast
import difflib
import importlib
import sys
from importlib import metadata
from pathlib import Path

from smollm_jax.errors import UsageError
from smollm_jax.runtime.invocation import VERBS
from smollm_jax.runtime.program import run_main

ELSEWHERE = {"parity": "smollm_parity.command"}  # verbs whose module is not smollm_jax.commands.VERB


def main() -> None:
    """Runs the verb on this process's command line, and exits as its script does."""
    run_main(lambda: run(sys.argv[1:]))


def run(arguments: list[str]) -> None:
    """Runs a verb with its flags; prints the verbs where there is none. Raises `UsageError` for one there is not."""
    verb = arguments[0] if arguments else "help"
    if verb in ("help", "-h", "--help"):
        print(listing())
    elif verb in ("version", "--version"):
        print(f"smollm-jax {metadata.version('smollm-jax')}")
    elif verb in VERBS:
        sys.argv[:] = [f"smollm {verb}", *arguments[1:]]  # for usage lines and messages: see `invocation`
        importlib.import_module(module_of(verb)).main(arguments[1:])
    else:
        raise UsageError(f"smollm {verb}: {_advice(verb)} (all verbs: smollm --help)")


def module_of(verb: str) -> str:
    """The module whose `main` a verb runs."""
    return ELSEWHERE.get(verb, f"smollm_jax.commands.{verb.replace('-', '_')}")


def listing() -> str:
    """The verbs that are installed, each with the first line of its module's docstring."""
    sources = {verb: source_of(module_of(verb)) for verb in VERBS}
    lines = [f"  {verb:<12} {first_line(source)}" for verb, source in sources.items() if source.exists()]
    return "\n".join(["usage: smollm VERB [flags]", "", *lines, "", "smollm VERB --help shows a verb's flags."])


def source_of(module: str) -> Path:
    """Where a module of ours has its file: every package lies beside this one. Imports nothing."""
    return Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py")


def first_line(source: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _advice(verb: str) -> str:
    """What to say of a verb that there is not, which may be a script's name."""
    scripts = {script: verb for verb, script in VERBS.items()}
    script = verb.removesuffix(".py").replace("-", "_")
    near = [scripts[script]] if script in scripts else difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
    return f"no such verb{f'; perhaps smollm {near[0]}' if near else ''}"


if __name__ == "__main__":
    main()
