"""Tokenize text, JSON and tables into a data set for training: sharded token files with a manifest, on all cores.

    python scripts/prepare_data.py my_text/ notes.jsonl.zst 'dumps/*.parquet' --out data/web
    python scripts/prepare_data.py code/ --text-column content --out data/code
    python scripts/train_jax.py --data data/web:0.75 data/code:0.25
    python scripts/prepare_data.py --verify data/web data/code      # check every byte of prepared sets

A source is a file, a folder or a glob of plain text, .jsonl, .json, .csv, .tsv (each also .gz, .zst, .xz, .bz2),
.parquet and .arrow; .zst, Parquet and Arrow need the extra `data`. In a folder, hidden files, dataset cards and all
splits except the training split are skipped, with a note. After a stop or a kill, the same command continues. The
result is the same, byte for byte, for any number of workers. More, with the SmolLM corpus as an example: docs/data.md.
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
    """Folder with tokenizer.json and tokenizer_config.json."""
    text_column: str = "text"
    """JSON field or table column that holds the text."""
    on_bad_text: Literal["stop", "skip", "replace"] = "stop"
    """What to do with a text that cannot be encoded (null, not UTF-8, NUL or another character that the vocabulary
    lacks): stop with an error, skip its document, or replace each such character by U+FFFD."""
    special_tokens: bool = False
    """Encode a special token in a text, such as <|im_start|>, as one token, as transformers does, instead of as plain
    text."""
    shard_tokens: int = 1 << 24
    """Tokens per file of the set; each worker holds that many in memory, with their text."""
    workers: int = 0
    """Worker processes, which share the cores; 0: one per four cores."""
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
        raise errors.UsageError("name at least one file, folder or glob of text")
    if flags.verify:
        for folder in map(Path, flags.sources):
            if not any((folder / name).is_file() for name in (MANIFEST, "tokens.json")):
                reason = "is not a prepared set, or an unfinished one" if folder.exists() else "no such folder"
                raise errors.InputFileError(f"{folder}: {reason}")
            tokens = TokenSet.open(folder)
            for file in tokens.files:
                file.verify()
            print(f"{folder}: {_counts(tokens)}, all checksums match")
        return
    if flags.out is None:
        raise errors.UsageError("name a folder for the data set with --out")
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
    print(f"{len(plan.files):,} files, {size / 1e6:,.0f} MB, in {len(plan.units):,} work units", flush=True)
    with RunLock(flags.out, "preparation"):
        build_dataset(flags.out, plan, settings, flags.workers, stop)
    print(f"{flags.out}: {_counts(TokenSet.open(flags.out))}")
    for line in summary_lines(flags.out):
        print(line)
    print(f"\nnext: {as_typed('python scripts/train_jax.py')} --data {flags.out}")


def _counts(tokens) -> str:
    return f"{tokens.documents:,} documents, {tokens.tokens:,} tokens in {len(tokens.files):,} files"
