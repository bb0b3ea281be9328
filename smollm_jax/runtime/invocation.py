"""How messages name commands: as `smollm VERB` or as a script, whichever the user started."""

import re
import sys

VERBS = {  # verb of `smollm`: name of the same command under scripts/
    "train": "train_jax",
    "finetune": "finetune",
    "generate": "generate",
    "chat": "chat",
    "app": "app",
    "serve": "serve",
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
    """Whether this process is `smollm VERB`, which sets `sys.argv[0]` to "smollm VERB"."""
    return sys.argv[0].startswith("smollm ")


def this_command() -> str:
    """The command that the user typed, without flags: "smollm train" or "python scripts/train_jax.py"."""
    return sys.argv[0] if started_as_smollm() else f"python {sys.argv[0]}"


def as_typed(text: str) -> str:
    """The text with each `python scripts/NAME.py` replaced by `smollm VERB`, if the user started `smollm`."""
    return _replaced(r"python scripts/(\w+)\.py", text)


def names_as_typed(text: str) -> str:
    """As `as_typed`, and also replaces a bare `NAME.py`; not for texts that may contain a user's file name."""
    return _replaced(r"(?<![\w/.])(?:python )?(?:scripts/)?(\w+)\.py\b", text)


def _replaced(pattern: str, text: str) -> str:
    if not started_as_smollm():
        return text
    return re.sub(pattern, lambda match: f"smollm {_VERB_OF[match[1]]}" if match[1] in _VERB_OF else match[0], text)
