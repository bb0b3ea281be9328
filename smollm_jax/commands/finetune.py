"""Fine-tune SmolLM2 on chats, or on pairs of a chosen and a rejected answer.

    python scripts/finetune.py --data my_chats.jsonl             # the Instruct weights, everything chosen
    python scripts/finetune.py --data my_chats.jsonl --weights runs/my-run --steps 500
    python scripts/finetune.py --data chats.jsonl:0.7 code.jsonl:0.3     # of every ten rows, seven of the first file
    python scripts/finetune.py --data my_chats.jsonl --lora-rank 16      # trains a LoRA adapter, in peft's layout
    python scripts/finetune.py --data prefs.jsonl --method dpo --weights runs/my-sft
    python scripts/finetune.py --data my_chats.jsonl --show-mask 3    # what is learnt of three of them; trains nothing
    python scripts/finetune.py                                   # without chats of your own: those of assets/chats
    python scripts/finetune.py --resume                          # go on with the newest run

The answers are learnt, not the questions; several chats share a row and do not see each other. Without a GPU a run is
at most 60 steps of 2 x 512 tokens. The run folder is one like any other: chat.py, generate.py, app.py, evaluate.py
and convert_weights.py take it as --weights.
"""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.config.finetune_recipe import choose
from smollm_jax.finetuning.flags import Flags
from smollm_jax.runtime import allocator
from smollm_jax.runtime.assets import asset
from smollm_jax.runtime.startup import QuickStart

if TYPE_CHECKING:
    from smollm_jax.runtime.signals import StopSignal

WEIGHTS, CHATS = "SmolLM2-135M-Instruct", "chats"


def main(argv: list[str] | None = None) -> None:
    startup = QuickStart(threads=True)
    flags = command_line.parse(Flags, argv, __doc__, weights=("weights",))
    for name in ("log_every", "keep_checkpoints"):
        if getattr(flags, name) < 1:
            raise errors.UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(flags, name)}")
    if flags.show_mask < 0:
        raise errors.UsageError(f"--show-mask must be a number of examples, got {flags.show_mask}")
    if flags.show_mask and flags.resume:
        raise errors.UsageError("--show-mask trains nothing: leave --resume out, and name the --data")
    from smollm_jax.runtime.signals import StopSignal

    begin(flags, StopSignal().install(), startup)


def begin(flags: Flags, stop: "StopSignal", startup: QuickStart) -> None:
    """Fine-tunes in the run folder the flags name, which is locked meanwhile."""
    from smollm_jax import weights
    from smollm_jax.data.mixture import parse_sources
    from smollm_jax.data.text_sources import text_files
    from smollm_jax.runs.folder import check_no_checkpoint, clean_up_failed_start, newest_run
    from smollm_jax.runtime.lock import RunLock

    if flags.resume:
        run = flags.out or newest_run()
        if not (run / "checkpoints").is_dir():
            raise errors.CheckpointError(f"--resume: {run / 'checkpoints'}: no such checkpoint folder")
    else:
        if flags.allow_change or flags.allow_unverified:
            raise errors.UsageError("--allow-change and --allow-unverified are for --resume only")
        _, recipe = choose(flags.recipe, flags.method)
        if recipe.method == "dpo" and not flags.data:
            raise errors.UsageError("--data: name the preference pairs to learn from, a .jsonl file for example")
        data = flags.data or (str(asset(CHATS)),)
        if not flags.data and not Path(data[0]).exists():
            raise errors.InputFileError(
                f"{data[0]}: no such folder: fetch it with `python scripts/fetch_assets.py chats`, or name your --data"
            )
        for path in parse_sources(data)[0]:
            text_files(path)
        start = flags.weights or asset(WEIGHTS)
        weights.kind_of(start)
        flags = dataclasses.replace(flags, data=data, weights=start)
        if flags.show_mask:
            show_mask(flags, data, start)
            return
        run = flags.out or Path(f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{recipe.method}")
        check_no_checkpoint(run)
        if any(run.glob("*")) and not (run / "lock").exists():
            raise errors.UsageError(f"{run}: exists and is no run: name another --out")
    with contextlib.ExitStack() as stack:
        stack.enter_context(RunLock(run))
        stack.enter_context(clean_up_failed_start(run))
        if not flags.resume:
            check_no_checkpoint(run)  # another trainer may have had it in between
        retained = allocator.retain_freed_memory()  # before there are threads that allocate
        from smollm_jax.finetuning.run import run_finetuning

        run_finetuning(run, flags, stop, startup, retained=retained)


def show_mask(flags: Flags, sources: tuple[str, ...], start: Path) -> None:
    """Prints the first examples token by token; what is learnt is green."""
    from rich.console import Console

    from smollm_jax.data.examples.examples import read_examples, read_pairs
    from smollm_jax.data.examples.show import mask_of
    from smollm_jax.data.mixture import parse_sources
    from smollm_jax.finetuning.chat_format import chat_tokenizer
    from smollm_jax.tokenizer import Tokenizer

    tokenizer = chat_tokenizer(Tokenizer.of_weights(start))
    _, named = choose(flags.recipe, flags.method)
    unused = {"dtype": "float32", "lora_rank": 0, "lora_dropout": 0.0}  # trains nothing
    recipe = named.resolve(flags.recipe_fields() | unused, 1)
    paths, _ = parse_sources(sources)
    options: dict[str, Any] = {"max_length": recipe.sequence_length, "on_bad_text": flags.on_bad_text}
    options["most"] = flags.show_mask
    if recipe.method == "dpo":
        pairs, report = read_pairs(paths, tokenizer, **options)
        examples = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    else:
        examples, report = read_examples(paths, tokenizer, learn=recipe.learn, **options)
    console = Console(highlight=False, soft_wrap=True)
    for example in examples:
        console.print(mask_of(example, tokenizer))
    print(*report.lines(), sep="\n")
