"""Draw a run's loss, learning rate and throughput to a PNG.

    python scripts/plot_run.py runs/my-run                           # writes runs/my-run/curves.png
    python scripts/plot_run.py runs/jax runs/torch --out both.png    # two runs laid over each other

Needs the extra "plot".
"""

import dataclasses
from pathlib import Path

import tyro

from smollm_jax import errors
from smollm_jax.commands import command_line
from smollm_jax.runtime import install


@dataclasses.dataclass(frozen=True)
class Flags:
    runs: tyro.conf.Positional[list[Path]]
    """Run folders."""
    out: Path | None = None
    """PNG to write; default: curves.png in the first run."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


def main(argv: list[str] | None = None) -> None:
    flags = command_line.parse(Flags, argv, __doc__)
    if not flags.runs:
        raise errors.UsageError("name at least one run folder")
    try:
        import matplotlib
    except ImportError as error:
        raise errors.UsageError(install.needs("plot_run.py", "plot")) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from smollm_jax.runs import plots
    from smollm_jax.runs.metrics import read_metrics

    figure, (loss, rate, speed) = pyplot.subplots(
        3, 1, sharex=True, figsize=(8, 9), height_ratios=(3, 1, 1), layout="constrained"
    )
    for run in flags.runs:
        rows = read_metrics(run)
        steps = [row for row in rows if "loss" in row]
        validated = [row for row in rows if "validation_loss" in row]
        if not steps:
            raise errors.InputFileError(f"{run / 'metrics.jsonl'}: holds no training step")
        x = [row["step"] for row in steps]
        (line,) = loss.plot(x, [row["loss"] for row in steps], linewidth=1, label=f"{run.name}, training")
        if validated:
            loss.plot(
                [row["step"] for row in validated],
                [row["validation_loss"] for row in validated],
                "o--",
                color=line.get_color(),
                markersize=4,
                label=f"{run.name}, validation",
            )
        rate.plot(x, [row["learning_rate"] for row in steps], color=line.get_color())
        speed.plot(x, [row["tokens_per_second"] for row in steps], color=line.get_color(), linewidth=1)
    loss.set_ylabel("loss, nats per token")
    loss.legend(frameon=False)
    rate.set_ylabel("learning rate")
    speed.set_ylabel("tokens / s")
    speed.set_ylim(bottom=0)
    speed.set_xlabel("step")
    for axes in (loss, rate, speed):
        plots.style(axes)
    out = flags.out or flags.runs[0] / "curves.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    print(out)
