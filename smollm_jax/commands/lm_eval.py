"""Score weights on tasks of EleutherAI's lm-evaluation-harness (extra "eval").

    python scripts/run_lm_eval.py --weights assets/SmolLM2-135M-Instruct --tasks hellaswag arc_easy piqa
    python scripts/run_lm_eval.py --weights runs/my-run --include my-tasks/ --tasks my_task --out results.json

Tasks are the harness's own by name, which fetches their data sets from the Hugging Face hub, or those of YAML files in
a folder given with --include, whose data may be local. Greedy and log-likelihood answers are those of the harness's
`hf` model on the same weights; questions that share a context share its forward pass. (Beside a script called
lm_eval.py, Python would take it for the harness's package lm_eval: hence this one's name.)
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.runtime import install


@dataclasses.dataclass(frozen=True)
class Flags:
    weights: Path
    """Weights of any kind."""
    tasks: tuple[str, ...]
    """Names of tasks."""
    include: Path | None = None
    """Folder with the YAML files of more tasks."""
    num_fewshot: int | None = None
    """Examples before each question; default: what the task says."""
    limit: int | None = None
    """Questions of each task, the first ones; for a quick look only."""
    chat: bool = False
    """Ask as the user of a chat (Instruct weights)."""
    on_bad_text: Literal["stop", "skip", "replace"] = "stop"
    """What becomes of a character in a task's text that the vocabulary lacks: an error, left out as the harness's `hf`
    does without a word, or replaced by U+FFFD."""
    seed: int = 0
    """Of tasks that sample."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights and the cache."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json (or a GGUF), for weights that have none of their own."""
    out: Path | None = None
    """JSON file to write: scores, versions of the tasks, and each answer."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


GROUPS = {
    "tasks": ("tasks", "include", "num_fewshot", "limit", "chat", "on_bad_text", "seed"),
    "model": ("weights", "dtype", "tokenizer"),
    "output": ("out", "debug"),
}


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__, weights=("weights",))
    if not flags.tasks:
        raise errors.UsageError("--tasks: name at least one")
    if flags.include and not flags.include.is_dir():
        raise errors.UsageError(f"--include {flags.include}: no such folder")
    if flags.out and flags.out.exists():
        raise errors.UsageError(f"--out {flags.out}: exists already; name another file or remove it first")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise errors.UsageError(f"{error.name} is missing: {install.needs('run_lm_eval.py', 'eval')}") from error
    from smollm_jax.evaluation.lm_eval_model import SmolLMHarness
    from smollm_jax.generation.engine import Engine
    from smollm_jax.runtime import compilation_cache

    manager = TaskManager(include_path=str(flags.include) if flags.include else None)
    if unknown := [task for task in flags.tasks if task not in manager.all_tasks]:
        raise errors.UsageError(f"--tasks: no task is called {', '.join(unknown)}")
    compilation_cache.enable()
    engine = Engine.load(flags.weights, dtype=flags.dtype, tokenizer=flags.tokenizer)
    evaluate: Any = lm_eval.simple_evaluate  # decorated, so that no type checker knows its parameters
    model = SmolLMHarness(engine, name=str(flags.weights), seed=flags.seed, on_bad_text=flags.on_bad_text)
    results = evaluate(
        model,
        tasks=list(flags.tasks),
        num_fewshot=flags.num_fewshot,
        limit=flags.limit,
        task_manager=manager,
        apply_chat_template=flags.chat,
        log_samples=flags.out is not None,
        bootstrap_iters=1000,
    )
    if results is None:  # of a process that is not the first of several
        return
    print(make_table(results))
    if model.bad_texts:
        print(
            f"note: texts with characters that the vocabulary lacks: {model.bad_texts:,}, {flags.on_bad_text} for each"
        )
    if flags.out:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        flags.out.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
