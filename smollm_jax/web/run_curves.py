"""Curves of training runs, read incrementally from `metrics.jsonl` while the runs are written."""

import html
import math
import threading
import time
from pathlib import Path
from stat import S_ISREG
from typing import Any

from smollm_jax.errors import InputFileError
from smollm_jax.runs.answers import read as read_answers
from smollm_jax.runs.metrics import MAX_ROW_BYTES, parse_row
from smollm_jax.runtime.files import utf8
from smollm_jax.runtime.invocation import as_typed

CURVES = {
    "Training loss": "loss",
    "Validation loss": "validation_loss",
    "Learning rate": "learning_rate",
    "Gradient norm": "gradient_norm",
    "Tokens per second": "tokens_per_second",
    "Reward margin (DPO)": "rewards/margins",
}
COLUMNS = ("run", "last written", "step", "loss", "validation", "tokens/s", "checkpoints")
MAX_POINTS = 200  # of a curve on the page
LIVE_SECONDS = 20  # a run whose log changed this recently is being trained
READ_BYTES = 16 << 20  # at once

Point = tuple[int, float]


class RunCurves:
    """One run's log so far. An incomplete last line is read later; a resumed run replaces the steps it repeats."""

    def __init__(self, path: Path):
        self.path = path
        self._reset()

    def _reset(self) -> None:
        self.curves: dict[str, list[Point]] = {name: [] for name in CURVES.values()}
        self.step, self.error, self.modified_time = 0, "", 0.0
        self._bytes_read, self._lines_read, self._inode = 0, 0, -1

    def read_new_rows(self) -> None:
        """Reads the rows added since the last call; a replaced or shortened log is read from its start."""
        try:
            stat = self.path.stat()
            if not S_ISREG(stat.st_mode):
                raise OSError(0, "it is not a file")
            if stat.st_ino != self._inode or stat.st_size < self._bytes_read:
                self._reset()
                self._inode = stat.st_ino
            self.modified_time = stat.st_mtime
            if stat.st_size == self._bytes_read or self.error:
                return
            with self.path.open("rb") as file:
                file.seek(self._bytes_read)
                new = file.read(READ_BYTES)
        except OSError as error:
            self._reset()
            self.error = f"metrics.jsonl cannot be read: {error.strerror}"
            return
        complete = new[: new.rfind(b"\n") + 1]
        self._bytes_read += len(complete)
        lines = complete.splitlines()
        if len(new) - len(complete) > MAX_ROW_BYTES:
            lines.append(new[len(complete) :])  # refused as too long
        for line in lines:
            self._lines_read += 1
            try:
                self._add(parse_row(line))
            except ValueError:
                self.error = f"metrics.jsonl: line {self._lines_read} is not a row of metrics"
                return

    def _add(self, row: dict[str, Any]) -> None:
        step = row["step"]
        if (first_repeated := step + ("loss" not in row)) <= self.step:
            for points in self.curves.values():
                while points and points[-1][0] >= first_repeated:
                    points.pop()
        self.step = step
        for name, points in self.curves.items():
            value: Any = row.get(name)  # null for NaN and infinity
            if type(value) in (int, float) and math.isfinite(value):
                points.append((step, float(value)))

    def last(self, name: str) -> float | None:
        """The curve's newest value."""
        points = self.curves[name]
        return points[-1][1] if points else None


class CurvesByRun:
    """The curves of every run that was asked for."""

    def __init__(self) -> None:
        self._logs: dict[Path, RunCurves] = {}
        self._lock = threading.Lock()

    def curves_of(self, run: Path) -> RunCurves:
        """A run's curves up to now."""
        with self._lock:
            log = self._logs.setdefault(run, RunCurves(run / "metrics.jsonl"))
            log.read_new_rows()
            return log


def downsampled(points: list[Point], max_points: int = MAX_POINTS) -> list[Point]:
    """At most `max_points` points, each the mean of a group of neighbours, at the last one's step."""
    size = -(-len(points) // max_points)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else [[p] for p in points]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def table(logs: dict[str, tuple[RunCurves, list[int]]]) -> str:
    """The runs as an HTML table, with the columns `COLUMNS`."""
    if not logs:
        train = as_typed("python scripts/train_jax.py")
        return f'<p class="empty">No run yet: <code>{train}</code> trains one.</p>'
    rows = []
    for name, (log, steps) in logs.items():
        seconds = time.time() - log.modified_time
        live = '<span class="live">training</span>' if seconds < LIVE_SECONDS else html.escape(time_ago(seconds))
        cells = [
            html.escape(name),
            f'<span class="fault">{html.escape(log.error)}</span>' if log.error else live,
            f"{log.step:,}",
            *(formatted(log.last(curve), ".3f") for curve in ("loss", "validation_loss")),
            formatted(log.last("tokens_per_second"), ",.0f"),
            f"{len(steps)} ({steps[0]:,} to {steps[-1]:,})" if steps else "none",
        ]
        # Explicit roles: on a phone rows are CSS blocks, which a screen reader would not announce as rows.
        row = (f'<td role="cell" data-head="{head}">{cell}</td>' for head, cell in zip(COLUMNS, cells, strict=True))
        rows.append(f'<tr role="row">{"".join(row)}</tr>')
    head = "".join(f'<th role="columnheader">{name}</th>' for name in COLUMNS)
    return (
        f'<table class="runs" role="table"><thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(rows)}</tbody></table>'
    )


def answers_table(run: Path) -> str:
    """The answers of a fine-tuning run before and after training as an HTML table; "" for a run without any."""
    try:
        answers = read_answers(run)
    except InputFileError as error:
        return f'<p class="fault">{html.escape(utf8(str(error)))}</p>'
    if not answers:
        return ""
    heads = ("question", "before", "after")
    rows = []
    for answer in answers:
        texts = (answer.prompt, answer.before, answer.after)
        cells = (
            f'<td role="cell" data-head="{head}">{"-" if text is None else html.escape(text)}</td>'
            for head, text in zip(heads, texts, strict=True)
        )
        rows.append(f'<tr role="row">{"".join(cells)}</tr>')
    head = "".join(f'<th role="columnheader">{name}</th>' for name in heads)
    return (
        "<h4>Answered before and after fine-tuning</h4>"
        f'<table class="runs answers" role="table"><thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(rows)}</tbody></table>'
    )


def formatted(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def time_ago(seconds: float) -> str:
    """ "3 hours ago" and the like, in the largest unit that fits."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        if (count := int(seconds // length)) >= 1:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "now"
