"""A run's log: `metrics.jsonl` always, a live line on a terminal, plain lines elsewhere, TensorBoard on request.

Framework-free: both trainers write the same file, so that their curves can be laid over each other.
"""

import collections
import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from smollm_jax.errors import InputFileError, StoppedError, StorageError, UsageError
from smollm_jax.runs.tracking import Tracker, first_line
from smollm_jax.runtime import install

RATE_STEPS = 20  # the throughput is the mean over this many steps


class RunLog:
    """Writes each step's numbers; use as a context manager so that the terminal and the files are left whole."""

    def __init__(
        self,
        run: Path,
        *,
        log_every: int,
        flops_per_token: float,
        peak_flops: float | None,
        bytes_per_token: float | None = None,  # of the held-out text
        tensorboard: bool = False,
        tracker: Tracker | None = None,
        kept: bool = True,  # False: another process writes the file
    ):
        self._started_at: float | None = None  # the validation loss at step 0
        if kept:
            run.mkdir(parents=True, exist_ok=True)
            self._file = (run / "metrics.jsonl").open("a+b")
            self._file.truncate(_whole_lines(self._file))
            self._started_at = _loss_at_start(self._file)
        else:
            self._file = Path(os.devnull).open("wb")  # noqa: SIM115  # closed by __exit__, like the other
        self._log_every = log_every
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._bytes_per_token = bytes_per_token
        self._console = Console(stderr=False, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: Any = None
        self._writer = _tensorboard(run) if tensorboard else None
        self._tracker = tracker
        self._above = 0  # validations in a row above step 0's; -1 once the reader knows

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._track("finish", failed=kind is not None and not issubclass(kind, StoppedError))
        with contextlib.suppress(OSError):  # each row is flushed, and what failed was said then
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def note(self, text: str) -> None:
        """One line for the reader; not a metric."""
        self._console.print(text, markup=False)
        sys.stdout.flush()

    def start(self, step: int, steps: int, tokens_per_step: int) -> None:
        """The loop begins at `step` of `steps`: the first step's time includes its compilation."""
        self._steps, self._tokens_per_step = steps, tokens_per_step
        self._first = step
        self._began = time.perf_counter()
        self._times = collections.deque([(step, self._began)], maxlen=RATE_STEPS)
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("compiling", total=steps, completed=step)
            self._progress.start()
        else:
            self.note("compiling the first step")

    def resume_clock(self) -> None:
        """Leaves the time since the last step (compiling, saving, validating) out of the throughput."""
        if self._times[-1][0] == self._first:  # before the first step: out of all that is expected of the others, too
            self._began = time.perf_counter()
        self._times = collections.deque([(self._times[-1][0], time.perf_counter())], maxlen=RATE_STEPS)

    def step(self, step: int, *, skipped_windows: list[str] | None = None, **values: float) -> None:
        """Logs the numbers of one finished step; `skipped_windows`: its batch's, if its update was left out."""
        now = time.perf_counter()
        self._times.append((step, now))
        # Over several steps: metrics are read one step late, so two reads in a row can be moments apart.
        (first, then), rate = self._times[0], math.nan
        if now > then:
            rate = self._tokens_per_step * (step - first) / (now - then)
        row = {"step": step, **values, "tokens_per_second": rate, "elapsed_seconds": now - self._began}
        if step == self._first + 1:
            self.resume_clock()  # the first step compiled
        mfu = rate * self._flops_per_token / self._peak_flops if self._peak_flops else None
        row |= {} if mfu is None else {"mfu": mfu}
        self._write(row | ({} if skipped_windows is None else {"skipped_windows": skipped_windows}))
        text = (
            f"step {step}/{self._steps}  loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
            f"grad norm {values['gradient_norm']:.3f}  {rate:,.0f} tokens/s"
        )
        text += "" if mfu is None else f"  MFU {mfu:.1%}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=text)
        elif step % self._log_every == 0 or step == self._first + 1 or step == self._steps:
            done = step - self._first
            left = (now - self._began) / done * (self._steps - step)
            self.note(f"{text}  ETA {int(left // 60)}:{int(left % 60):02}")
        if skipped_windows is not None:
            self.note(f"{text}: not finite, update left out; windows {skipped_windows} of the training tokens")

    def validation(self, step: int, loss: float) -> None:
        """Logs the loss on held-out tokens, its perplexity, and as bits per byte where the bytes are known."""
        perplexity = math.exp(loss) if loss < 700 else math.inf
        row = {"step": step, "validation_loss": loss, "validation_perplexity": perplexity}
        text = f"step {step}/{self._steps}  validation loss {loss:.4f}  perplexity {perplexity:,.1f}"
        if self._bytes_per_token:
            row["validation_bits_per_byte"] = bits_per_byte(loss, self._bytes_per_token)
            text += f"  {row['validation_bits_per_byte']:.3f} bits per byte"
        self._write(row)
        self.note(text)
        if step == 0:
            self._started_at = loss
        elif self._started_at is not None:
            self._compare_with_start(step, loss, self._started_at)

    def _compare_with_start(self, step: int, loss: float, at_start: float) -> None:
        """Says once that training makes the weights worse: at the second validation in a row, or the last one."""
        if self._above < 0:
            return
        self._above = 0 if loss <= at_start else self._above + 1
        if self._above == 2 or (self._above and step == self._steps):
            again = "" if self._above == 1 else "for the second time in a row "
            self.note(
                f"note: the validation loss is {again}above that of the weights this run started from ({loss:.4f}, "
                f"{at_start:.4f} at step 0): training makes them worse on this text; start again with a lower "
                "--learning-rate"
            )
            self._above = -1

    def _track(self, call: str, *arguments: Any, **options: Any) -> None:
        """Calls the tracker; one that fails is left out from then on, and the training goes on."""
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, call)(*arguments, **options)
        except Exception as error:  # each service has its own
            service, self._tracker = self._tracker.service, None
            left_out = f"note: --track {service} failed and is left out from here on ({first_line(error)})"
            self.note(f"{left_out}; metrics.jsonl has every row")

    def _write(self, row: dict[str, Any]) -> None:
        # JSON has no NaN: a loss that is none is written as null.
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}
        try:
            self._file.write(json.dumps(finite).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(f"{self._file.name}: cannot be written: {error}") from error
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self._writer.add_scalar(name, value, row["step"])
        self._track("log", row)


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats per token as bits per byte of UTF-8, which compare across tokenizers."""
    return loss / math.log(2) / bytes_per_token


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, by step; what a resume went back over counts as it was done last."""
    rows: list[dict[str, Any]] = []
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise InputFileError(f"{path}: no such file")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            step, loss = row["step"], "loss" in row
        except (ValueError, KeyError, TypeError) as error:
            raise InputFileError(f"{path}: line {number} is not a row of metrics: {error}") from error
        if loss and rows and rows[-1]["step"] >= step:
            rows = [old for old in rows if old["step"] < step]
        rows.append(row)
    return rows


def _whole_lines(file: BinaryIO) -> int:
    """The bytes up to the end of the last whole line: a full disk or a power cut leaves half a one."""
    file.seek(0)
    return file.read().rfind(b"\n") + 1


def _loss_at_start(file: BinaryIO) -> float | None:
    """The validation loss of step 0, which a run that starts from weights has in its first line."""
    file.seek(0)
    first = file.readline()
    file.seek(0, os.SEEK_END)
    try:
        row = json.loads(first)
        return row.get("validation_loss") if row["step"] == 0 else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # no row; `read_metrics` says so to whoever reads the curves


def _tensorboard(run: Path) -> Any:
    try:
        from tensorboard.summary import Writer
    except ImportError as error:
        raise UsageError(install.needs("--tensorboard", "tensorboard")) from error
    return Writer(str(run / "tensorboard"))
