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
    """Runs the verb of this process's command line and exits with the same codes as its script."""
    run_main(lambda: run(sys.argv[1:]))


def run(arguments: list[str]) -> None:
    """Runs a verb with its flags, or lists the verbs if none is given. Raises `UsageError` for an unknown verb."""
    verb = arguments[0] if arguments else "help"
    if verb in ("help", "-h", "--help"):
        print(listing())
    elif verb in ("version", "--version"):
        print(f"smollm-jax {metadata.version('smollm-jax')}")
    elif verb in VERBS:
        sys.argv[:] = [f"smollm {verb}", *arguments[1:]]  # usage lines and messages show it, see `invocation`
        importlib.import_module(module_of(verb)).main(arguments[1:])
    else:
        raise UsageError(f"smollm {verb}: {_advice(verb)} (all verbs: smollm --help)")


def module_of(verb: str) -> str:
    """The module whose `main` a verb runs."""
    return ELSEWHERE.get(verb, f"smollm_jax.commands.{verb.replace('-', '_')}")


def listing() -> str:
    """The installed verbs, each with the first line of its module's docstring."""
    sources = {verb: source_of(module_of(verb)) for verb in VERBS}
    lines = [f"  {verb:<12} {first_line(source)}" for verb, source in sources.items() if source.exists()]
    return "\n".join(["usage: smollm VERB [flags]", "", *lines, "", "smollm VERB --help shows a verb's flags."])


def source_of(module: str) -> Path:
    """The file of one of our modules, without importing it: all our packages lie in the same folder."""
    return Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py")


def first_line(source: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _advice(verb: str) -> str:
    """The message for an unknown verb, with the closest one; the name of a script suggests its verb."""
    verb_of_script = {script: verb for verb, script in VERBS.items()}
    script = verb.removesuffix(".py").replace("-", "_")
    matches = [verb_of_script[script]] if script in verb_of_script else []
    matches = matches or difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
    return f"no such verb{f'; perhaps smollm {matches[0]}' if matches else ''}"


if __name__ == "__main__":
    main()
