"""How this process was started, and so how its messages name commands: `smollm VERB`, or a script by its path."""

import re
import sys

VERBS = {  # what follows `smollm`: the name under scripts/ of the same command
    "train": "train_jax",
    "generate": "generate",
    "chat": "chat",
    "app": "app",
    "convert": "convert_weights",
    "evaluate": "evaluate",
    "prepare": "prepare_data",
    "plan-memory": "plan_memory",
    "verify": "verify_checkpoint",
    "export": "export",
    "plot": "plot_run",
    "fetch": "fetch_assets",
    "lm-eval": "run_lm_eval",
    "parity": "parity_report",
}
_VERB_OF = {script: verb for verb, script in VERBS.items()}


def started_as_smollm() -> bool:
    """Whether the console command runs, which puts its verb into `sys.argv[0]`: "smollm train"."""
    return sys.argv[0].startswith("smollm ")


def this_command() -> str:
    """What was typed, without its flags: "smollm train" or "python scripts/train_jax.py"."""
    return sys.argv[0] if started_as_smollm() else f"python {sys.argv[0]}"


def as_typed(text: str) -> str:
    """The text with each `python scripts/NAME.py` in it as the user would type it: `smollm VERB` under `smollm`."""
    return _replaced(r"python scripts/(\w+)\.py", text)


def names_as_typed(text: str) -> str:
    """As `as_typed`, for scripts named without `python` too: no text that may hold the name of a user's file."""
    return _replaced(r"(?<![\w/.])(?:python )?(?:scripts/)?(\w+)\.py\b", text)


def _replaced(pattern: str, text: str) -> str:
    if not started_as_smollm():
        return text
    return re.sub(pattern, lambda match: f"smollm {_VERB_OF[match[1]]}" if match[1] in _VERB_OF else match[0], text)
