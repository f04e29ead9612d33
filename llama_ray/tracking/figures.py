"""Figures of a run, drawn with Matplotlib's object interface, which leaves no global state in the process."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

_SMOOTH_FROM = 100
"""Points; shorter curves are not smoothed."""
_WINDOWS = 50
"""The running mean covers 1/50 of the run."""


def loss_curve(
    train: Mapping[float, float],
    validation: Mapping[float, float],
    *,
    x_label: str = "steps",
) -> Figure:
    """Plot training and validation loss in nats per token; both map a position in units of `x_label` to a loss.

    NaN leaves a gap. A long training curve is noisy: it is drawn faintly, and its running mean in front of it.
    """
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    x, y = _columns(train)
    if len(x) >= _SMOOTH_FROM:
        axes.plot(x, y, color="C0", alpha=0.25, linewidth=0.8)
        axes.plot(*_running_mean(x, y, len(x) // _WINDOWS), color="C0", label="train (running mean)")
    elif len(x):
        axes.plot(x, y, color="C0", label="train")
    if validation:
        axes.plot(*_columns(validation), color="C1", marker="o", markersize=4, label="validation")
    axes.set(xlabel=x_label, ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend(frameon=False)
    return figure


def _columns(points: Mapping[float, float]) -> tuple[np.ndarray, np.ndarray]:
    x = np.array(sorted(points), dtype=np.float64)
    y = np.array([points[key] for key in sorted(points)], dtype=np.float64)
    return x, np.where(np.isfinite(y), y, np.nan)


def _running_mean(x: np.ndarray, y: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    keep = np.isfinite(y)
    sums = np.cumsum(np.concatenate([[0.0], y[keep]]))
    last = np.arange(1, keep.sum() + 1)
    # The window ends at each point, so the end of the curve includes the latest losses.
    first = np.maximum(last - width, 0)
    return x[keep], (sums[last] - sums[first]) / (last - first)
