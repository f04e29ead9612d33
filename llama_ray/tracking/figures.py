"""Pictures of a run. Drawn with Matplotlib's object interface, so that no global state is left in the process."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

_SMOOTH_FROM = 100  # points; shorter curves are drawn as they are
_WINDOWS = 50  # a smoothed curve averages over 1/50 of the run


def loss_curve(
    train: Mapping[float, float],
    validation: Mapping[float, float],
    *,
    x_label: str = "steps",
    title: str = "",
) -> Figure:
    """Training and validation loss (nats per token) against `x_label` (position -> loss); NaN leaves a gap.

    A long training curve is drawn faintly with its running mean in front, as single steps are noisy.
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
    axes.set(xlabel=x_label, ylabel="loss (nats per token)", title=title)
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
    first = np.maximum(last - width, 0)  # trailing, so that the end of the curve is the latest news
    return x[keep], (sums[last] - sums[first]) / (last - first)
