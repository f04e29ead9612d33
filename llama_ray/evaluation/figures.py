"""The picture of a comparison, drawn with Matplotlib's object interface, which leaves no global state."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llama_ray.evaluation.comparison import CONFIDENCE, Comparison, Row, margin

_COLUMNS_FROM = 4
"""Scores; fewer stand in one column."""
_INCHES_PER_MODEL, _INCHES_PER_SCORE, _INCHES_PER_COLUMN = 0.28, 0.75, 5.0


def comparison_figure(comparison: Comparison) -> Figure:
    """Draw each score of all models as points with their confidence intervals, one panel for a score.

    A model that is better than each other beyond chance is a filled point, all others are hollow.
    """
    rows = comparison.rows
    columns = 2 if len(rows) >= _COLUMNS_FROM else 1
    height = _INCHES_PER_SCORE + _INCHES_PER_MODEL * len(comparison.labels)
    lines = -(-len(rows) // columns)
    figure = Figure(
        figsize=(_INCHES_PER_COLUMN * columns + 1, 0.4 + height * lines), dpi=120, layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{CONFIDENCE:.0%} confidence intervals; filled: better than each other model at that level",
        fontsize=9,
    )
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, row in zip(grid, rows, strict=False):
        _draw(axes, row, comparison.labels)
    for axes in grid[len(rows) :]:
        axes.set_axis_off()
    return figure


def _draw(axes: Axes, row: Row, labels: tuple[str, ...]) -> None:
    better = "higher" if row.scores[0].higher_is_better else "lower"
    axes.set_title(f"{row.name} ({better} is better)", fontsize=9, loc="left")
    for place, score in enumerate(row.scores):
        color = f"C{place % 10}"
        axes.errorbar(
            score.value,
            place,
            xerr=margin(score),
            fmt="o",
            color=color,
            capsize=3,
            markerfacecolor=color if place == row.best else "white",
        )
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    # The first model is at the top.
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.margins(x=0.1)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
