"""The log of a run: `metrics.jsonl`, a progress bar on a terminal or plain lines elsewhere, TensorBoard on request.

Framework-free: both trainers write the same format, so that their curves can be plotted together.
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

from smollm_jax.errors import InputFileError, StoppedError, StorageError, UsageError, short_repr
from smollm_jax.runs.tracking import Tracker, first_line
from smollm_jax.runtime import install
from smollm_jax.runtime.files import file_size, one_line

RATE_STEPS = 20  # the throughput is the mean over this many steps
MAX_ROW_BYTES = 1 << 20  # of a line; one that names the windows of a skipped batch of 4,096 has 60 KB


class RunLog:
    """Writes the metrics of each step; use it as a context manager, which closes the files and the progress bar."""

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
        write_file: bool = True,  # False if another process writes metrics.jsonl
    ):
        self._initial_validation_loss: float | None = None  # at step 0, of a run that starts from weights
        if write_file:
            run.mkdir(parents=True, exist_ok=True)
            path = run / "metrics.jsonl"
            if path.exists() and not path.is_file():
                raise StorageError(f"{path}: is not a file")
            self._file = path.open("a+b")
            self._file.truncate(_end_of_last_line(self._file))
            self._initial_validation_loss = _loss_at_start(self._file)
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
        self._above_initial = 0  # consecutive validation losses above the initial one; -1 once that is reported

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._track("finish", failed=kind is not None and not issubclass(kind, StoppedError))
        with contextlib.suppress(OSError):  # every row is flushed, and a failed write was reported then
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def note(self, text: str) -> None:
        """Prints one line for the user; not a metric."""
        self._console.print(text, markup=False)
        sys.stdout.flush()

    def start(self, step: int, steps: int, tokens_per_step: int) -> None:
        """Starts the clock before the first step after `step`, whose time includes its compilation."""
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
        """Excludes the time since the last step (compiling, saving, validating) from the throughput."""
        if self._times[-1][0] == self._first:  # before the first step: exclude it from the ETA too
            self._began = time.perf_counter()
        self._times = collections.deque([(self._times[-1][0], time.perf_counter())], maxlen=RATE_STEPS)

    def step(self, step: int, *, skipped_windows: list[str] | None = None, **values: float) -> None:
        """Logs the metrics of a finished step; `skipped_windows`: the windows of a batch whose update was skipped."""
        now = time.perf_counter()
        self._times.append((step, now))
        # A mean over several steps: metrics are read one step late, so two reads may be only microseconds apart.
        (oldest_step, oldest_time), rate = self._times[0], math.nan
        if now > oldest_time:
            rate = self._tokens_per_step * (step - oldest_step) / (now - oldest_time)
        row = {"step": step, **values, "tokens_per_second": rate, "elapsed_seconds": now - self._began}
        if step == self._first + 1:
            self.resume_clock()  # the first step includes compilation
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
            remaining = (now - self._began) / done * (self._steps - step)
            self.note(f"{text}  ETA {int(remaining // 60)}:{int(remaining % 60):02}")
        if skipped_windows is not None:
            self.note(f"{text}: loss or gradient is not finite, update skipped; training windows {skipped_windows}")

    def validation(self, step: int, loss: float, **metrics: float) -> None:
        """Logs the loss on held-out tokens, its perplexity, and its bits per byte if `bytes_per_token` is known.

        Other `metrics` of the held-out data are written as "validation_NAME", and then there is no perplexity: the loss
        is no cross-entropy of tokens.
        """
        perplexity = math.exp(loss) if loss < 700 else math.inf
        row = {"step": step, "validation_loss": loss} | ({} if metrics else {"validation_perplexity": perplexity})
        means = "".join(f"  {name} {value:.4g}" for name, value in metrics.items())
        text = f"step {step}/{self._steps}  validation loss {loss:.4f}{means or f'  perplexity {perplexity:,.1f}'}"
        if self._bytes_per_token:
            row["validation_bits_per_byte"] = bits_per_byte(loss, self._bytes_per_token)
            text += f"  {row['validation_bits_per_byte']:.3f} bits per byte"
        self._write(row | {f"validation_{name}": value for name, value in metrics.items()})
        self.note(text)
        if step == 0:
            self._initial_validation_loss = loss
        elif self._initial_validation_loss is not None:
            self._warn_if_worse(step, loss, self._initial_validation_loss)

    def lacks_validation(self, step: int) -> bool:
        """Whether the file ends a step with its training row: a signal came before its validation."""
        if self._file.name == os.devnull:
            return False
        begins = f'{{"step": {step},'.encode()
        self._file.seek(0)
        rows = (line for line in iter(lambda: self._file.readline(MAX_ROW_BYTES), b"") if line.startswith(begins))
        last = collections.deque(rows, maxlen=1)
        return bool(last) and b'"validation_loss"' not in last[0]

    def _warn_if_worse(self, step: int, loss: float, initial_loss: float) -> None:
        """Prints one note if two consecutive validation losses, or the last one, are above that of step 0."""
        if self._above_initial < 0:
            return
        self._above_initial = 0 if loss <= initial_loss else self._above_initial + 1
        if self._above_initial == 2 or (self._above_initial and step == self._steps):
            again = "" if self._above_initial == 1 else "for the second time in a row "
            self.note(
                f"note: the validation loss is {again}above that of the weights this run started from ({loss:.4f}, "
                f"{initial_loss:.4f} at step 0): training makes them worse on this text; start again with a lower "
                "--learning-rate"
            )
            self._above_initial = -1

    def _track(self, call: str, *arguments: Any, **options: Any) -> None:
        """Calls the tracker; if that fails, disables it, and training continues."""
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, call)(*arguments, **options)
        except Exception as error:  # each service raises its own types
            service, self._tracker = self._tracker.service, None
            failure = f"note: --track {service} failed and is disabled for this run ({first_line(error)})"
            self.note(f"{failure}; metrics.jsonl has every row")

    def _write(self, row: dict[str, Any]) -> None:
        # JSON has no NaN or infinity: write null.
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
    """A loss in nats per token as bits per byte of UTF-8, which is comparable across tokenizers."""
    return loss / math.log(2) / bytes_per_token


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, by step; of a step repeated after a resume, only its last rows."""
    rows: list[dict[str, Any]] = []
    path = run / "metrics.jsonl"
    file_size(path)
    number = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            try:
                row = parse_row(line)
            except ValueError as error:
                raise InputFileError(f"{path}: line {number} is not a row of metrics: {one_line(error)}") from error
            # A resume repeats the steps after its checkpoint, and validates the checkpoint's own step if need be.
            while rows and rows[-1]["step"] >= row["step"] + ("loss" not in row):
                rows.pop()
            rows.append(row)
    return rows


def parse_row(line: bytes) -> dict[str, Any]:
    """A line of `metrics.jsonl`; `ValueError` if it is too long, or no object with a step of at most 64 bits."""
    if len(line) > MAX_ROW_BYTES:
        raise ValueError(f"it has more than {MAX_ROW_BYTES:,} bytes")
    try:
        row = json.loads(line, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    step = row.get("step") if isinstance(row, dict) else None
    if type(step) is not int or step < 0:
        raise ValueError(f"its step is {short_repr(step)}")
    return row


def _integer(digits: str) -> int:
    if len(digits) > 19 or abs(value := int(digits)) >= 1 << 63:
        raise ValueError(f"{short_repr(digits)} has more than 64 bits")
    return value


def _end_of_last_line(file: BinaryIO) -> int:
    """The offset after the last complete line: a full disk or a power failure can leave an incomplete one."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - MAX_ROW_BYTES)
        file.seek(start)
        if (newline := file.read(end - start).rfind(b"\n")) >= 0:
            return start + newline + 1
        end = start
    return 0


def _loss_at_start(file: BinaryIO) -> float | None:
    """The validation loss of step 0, which is in the first line of a run that starts from weights."""
    file.seek(0)
    first = file.readline(MAX_ROW_BYTES)
    file.seek(0, os.SEEK_END)
    try:
        row = parse_row(first)
        return row.get("validation_loss") if row["step"] == 0 else None
    except ValueError:
        return None  # not a row; `read_metrics` reports it when the curves are read


def _tensorboard(run: Path) -> Any:
    try:
        from tensorboard.summary import Writer
    except ImportError as error:
        raise UsageError(install.needs("--tensorboard", "tensorboard")) from error
    return Writer(str(run / "tensorboard"))
