"""The style of all plots: training curves, checkpoint quality, the parity report."""

from typing import Any


def style(axes: Any) -> None:
    """A light grid, and no frame at the top and on the right."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
