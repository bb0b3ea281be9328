"""Text to a data set for training: text, JSON, tables become sharded token files with a manifest, on all cores.

    python scripts/prepare_data.py my_text/ notes.jsonl.zst 'dumps/*.parquet' --out data/web
    python scripts/prepare_data.py code/ --text-column content --out data/code
    python scripts/train_jax.py --data data/web:0.75 data/code:0.25
    python scripts/prepare_data.py --verify data/web data/code      # read every byte of prepared sets again

A source is a file, a folder or a glob of plain text, .jsonl, .json, .csv, .tsv (each also .gz, .zst, .xz, .bz2),
.parquet and .arrow; .zst, Parquet and Arrow need the extra `data`. Of a folder, hidden files, dataset cards and all
splits but the one to train on are left out, and that is said. However it is stopped or killed, the same command goes on
with what is missing, and the result is the same, byte for byte, for any number of workers. All of it, and the SmolLM
corpus as an example: docs/data.md.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.runtime.assets import resolve_asset
from smollm_jax.runtime.invocation import as_typed


@dataclasses.dataclass(frozen=True)
class Flags:
    sources: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders and globs of text; with --verify: prepared sets."""
    out: Path | None = None
    """Folder of the data set."""
    tokenizer: Path = Path("assets/tokenizer")
    """Folder with tokenizer.json and its tokenizer_config.json."""
    text_column: str = "text"
    """Which field of JSON or column of a table is the text."""
    on_bad_text: Literal["stop", "skip", "replace"] = "stop"
    """What becomes of a text without tokens (a control character the vocabulary lacks, NUL, no UTF-8, null): it stops
    the preparation, its document is skipped, or each such character is replaced by U+FFFD."""
    special_tokens: bool = False
    """Read a special token that is written in a text, such as <|im_start|>, as one, as transformers does; else it is
    plain text."""
    shard_tokens: int = 1 << 24
    """Tokens after which the next file of the set begins; a worker holds as many in memory, with their text."""
    workers: int = 0
    """Processes, which share the cores; 0: one for every four."""
    verify: bool = False
    """Check every byte of prepared sets instead."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


GROUPS = {
    "data": ("sources", "text_column", "on_bad_text", "special_tokens", "tokenizer"),
    "output": ("out", "shard_tokens"),
    "running": ("workers", "verify", "debug"),
}


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__)
    from smollm_jax.data.plan import Settings, make_plan
    from smollm_jax.data.prepare import build_dataset, summary_lines
    from smollm_jax.data.token_file import MANIFEST, TokenSet
    from smollm_jax.runtime.lock import RunLock
    from smollm_jax.runtime.signals import StopSignal

    if not flags.sources:
        raise errors.UsageError("name at least one source")
    if flags.verify:
        for folder in map(Path, flags.sources):
            if not any((folder / name).is_file() for name in (MANIFEST, "tokens.json")):
                why = "is no prepared set that came to its end" if folder.exists() else "no such folder"
                raise errors.InputFileError(f"{folder}: {why}")
            tokens = TokenSet.open(folder)
            for file in tokens.files:
                file.verify()
            print(f"{folder}: {_counts(tokens)}, every byte as it was written")
        return
    if flags.out is None:
        raise errors.UsageError("name a folder with --out")
    if flags.out.exists() and not flags.out.is_dir():
        raise errors.UsageError(f"--out {flags.out}: is a file, not a folder")
    if flags.workers < 0:
        raise errors.UsageError(f"--workers must be at least 0, got {flags.workers}")
    stop = StopSignal().install("stopping; finished files are kept")
    settings = Settings(
        resolve_asset(flags.tokenizer), flags.text_column, flags.shard_tokens, flags.on_bad_text, flags.special_tokens
    )
    plan = make_plan([Path(source) for source in flags.sources], settings)
    print(*plan.notes, sep="\n", end="\n" * bool(plan.notes))
    size = sum(sum(unit.sizes) for unit in plan.units)
    print(f"{len(plan.files):,} files, {size / 1e6:,.0f} MB, in {len(plan.units):,} units of work", flush=True)
    with RunLock(flags.out, "preparation"):
        build_dataset(flags.out, plan, settings, flags.workers, stop)
    print(f"{flags.out}: {_counts(TokenSet.open(flags.out))}")
    for line in summary_lines(flags.out):
        print(line)
    print(f"\nnext: {as_typed('python scripts/train_jax.py')} --data {flags.out}")


def _counts(tokens) -> str:
    return f"{tokens.documents:,} documents, {tokens.tokens:,} tokens in {len(tokens.files):,} files"
