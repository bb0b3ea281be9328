"""Score weights on tasks of EleutherAI's lm-evaluation-harness (extra "eval").

    python scripts/run_lm_eval.py --weights assets/SmolLM2-135M-Instruct --tasks hellaswag arc_easy piqa
    python scripts/run_lm_eval.py --weights runs/my-run --include my-tasks/ --tasks my_task --out results.json

Tasks are the harness's own, whose data sets it downloads from the Hugging Face hub, or those of YAML files in the
folder --include, whose data may be local. Greedy and log-likelihood answers equal those of the harness's `hf` model on
the same weights; questions that share a context share its forward pass. (The script is not called lm_eval.py because
Python would then import it instead of the harness's package lm_eval.)
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
    """Weights in any format."""
    tasks: tuple[str, ...]
    """Names of tasks."""
    adapter: Path | None = None
    """A LoRA adapter for these weights: a folder in peft's layout, or a run that trained one."""
    include: Path | None = None
    """Folder with the YAML files of more tasks."""
    num_fewshot: int | None = None
    """Examples before each question. Default: the task's own number."""
    limit: int | None = None
    """Answer only the first questions of each task, for a quick look."""
    chat: bool = False
    """Send each question as a user message through the chat template (Instruct weights)."""
    on_bad_text: Literal["stop", "skip", "replace"] = "stop"
    """What to do with a character that the vocabulary lacks: stop with an error, skip it as the harness's `hf` model
    silently does, or replace it by U+FFFD."""
    seed: int = 0
    """Seed of tasks that sample."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and cache."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json (or a GGUF), for weights that have none of their own."""
    out: Path | None = None
    """JSON file to write: scores, versions of the tasks, and every answer."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


GROUPS = {
    "tasks": ("tasks", "include", "num_fewshot", "limit", "chat", "on_bad_text", "seed"),
    "model": ("weights", "adapter", "dtype", "tokenizer"),
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
    engine = Engine.load(flags.weights, dtype=flags.dtype, tokenizer=flags.tokenizer, adapter=flags.adapter)
    evaluate: Any = lm_eval.simple_evaluate  # its decorator hides the parameters from type checkers
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
    if results is None:  # in every process but the first
        return
    print(make_table(results))
    if model.bad_texts:
        action = {"skip": "dropped", "replace": "replaced"}[flags.on_bad_text]
        print(f"note: {model.bad_texts:,} texts had characters that the vocabulary lacks; these were {action}")
    if flags.out:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        flags.out.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
