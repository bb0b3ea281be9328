"""Training runs as they are written: the curves of `metrics.jsonl`, read on from where the last look ended."""

import html
import json
import math
import threading
import time
from pathlib import Path
from typing import Any

from smollm_jax.runtime.invocation import as_typed

CURVES = {
    "Training loss": "loss",
    "Validation loss": "validation_loss",
    "Learning rate": "learning_rate",
    "Gradient norm": "gradient_norm",
    "Tokens per second": "tokens_per_second",
}
HEADS = ("run", "last written", "step", "loss", "validation", "tokens/s", "checkpoints")
POINTS = 200  # of a curve on the page
LIVE_SECONDS = 20  # since the last line: a training under way
READ_BYTES = 16 << 20  # at one look

Point = tuple[int, float]


class RunCurves:
    """One run's log so far. A line that is still being written waits for its end; a resume takes steps back."""

    def __init__(self, path: Path):
        self.path = path
        self._start()

    def _start(self) -> None:
        self.curves: dict[str, list[Point]] = {name: [] for name in CURVES.values()}
        self.step, self.fault, self.written = 0, "", 0.0
        self._read, self._lines, self._file = 0, 0, -1

    def look(self) -> None:
        """Reads what is new; a log that was begun anew is read from its start."""
        try:
            about = self.path.stat()
            if about.st_ino != self._file or about.st_size < self._read:
                self._start()
                self._file = about.st_ino
            self.written = about.st_mtime
            if about.st_size == self._read or self.fault:
                return
            with self.path.open("rb") as file:
                file.seek(self._read)
                new = file.read(READ_BYTES)
        except OSError as error:
            self._start()
            self.fault = f"metrics.jsonl cannot be read: {error.strerror}"
            return
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            self._lines += 1
            try:
                self._add(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError):
                self.fault = f"metrics.jsonl: line {self._lines} is not a row of metrics"
                return

    def _add(self, row: Any) -> None:
        step = row["step"]
        if type(step) is not int:
            raise ValueError(step)
        if "loss" in row and step <= self.step:
            self.curves = {name: [p for p in points if p[0] < step] for name, points in self.curves.items()}
        self.step = max(step, self.step) if "loss" not in row else step
        for name, points in self.curves.items():
            value = row.get(name)  # null for a number that was none
            if type(value) in (int, float) and math.isfinite(value):
                points.append((step, float(value)))

    def last(self, name: str) -> float | None:
        """The curve's newest value."""
        points = self.curves[name]
        return points[-1][1] if points else None


class CurvesByRun:
    """The curves of all runs looked at so far."""

    def __init__(self) -> None:
        self._logs: dict[Path, RunCurves] = {}
        self._lock = threading.Lock()

    def of(self, run: Path) -> RunCurves:
        """A run's curves, read up to now."""
        with self._lock:
            log = self._logs.setdefault(run, RunCurves(run / "metrics.jsonl"))
            log.look()
            return log


def thinned(points: list[Point], most: int = POINTS) -> list[Point]:
    """At most `most` points, each the mean of as many neighbours as it takes."""
    size = -(-len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else [[p] for p in points]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def table(logs: dict[str, tuple[RunCurves, list[int]]]) -> str:
    """The runs as an HTML table: name, whether it is being written, where it stands, its checkpoints."""
    if not logs:
        train = as_typed("python scripts/train_jax.py")
        return f'<p class="empty">No run yet: <code>{train}</code> trains one.</p>'
    rows = []
    for name, (log, steps) in logs.items():
        ago = time.time() - log.written
        live = '<span class="live">training</span>' if ago < LIVE_SECONDS else html.escape(since(ago))
        cells = [
            html.escape(name),
            f'<span class="fault">{html.escape(log.fault)}</span>' if log.fault else live,
            f"{log.step:,}",
            *(shown(log.last(curve), ".3f") for curve in ("loss", "validation_loss")),
            shown(log.last("tokens_per_second"), ",.0f"),
            f"{len(steps)} ({steps[0]:,} to {steps[-1]:,})" if steps else "none",
        ]
        # The role is said because a phone shows rows as blocks, which are no rows to a screen reader.
        row = (f'<td role="cell" data-head="{head}">{cell}</td>' for head, cell in zip(HEADS, cells, strict=True))
        rows.append(f'<tr role="row">{"".join(row)}</tr>')
    head = "".join(f'<th role="columnheader">{name}</th>' for name in HEADS)
    return (
        f'<table class="runs" role="table"><thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(rows)}</tbody></table>'
    )


def shown(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def since(seconds: float) -> str:
    """How long ago, in the largest unit that fits."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        if (count := int(seconds // length)) >= 1:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "now"
