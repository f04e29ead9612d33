"""The section of the report about what cleaning took away."""

from __future__ import annotations

from llama_ray.data.cleaning.drops import Dropped, Drops, Example
from llama_ray.data.dataset.info import DatasetInfo
from llama_ray.data.report.charts import bar
from llama_ray.data.report.html import Html, element, join
from llama_ray.data.report.numbers import share, short


def cleaning(info: DatasetInfo, drops: Drops) -> Html:
    """Return each rule with what it took away, and examples to open."""
    rows = drops.rows()
    if not rows:
        return Html()
    texts = sum(source.texts for source in info.sources)
    dropped = sum(row.count for row in rows if row.unit == "text")
    lines = sum(row.count for row in rows if row.unit == "line")
    told = f"{dropped:,} of {texts:,} texts were dropped ({share(dropped, texts)})"
    if lines:
        told += f", and {lines:,} lines of other texts"
    most = max(row.characters for row in rows) or 1
    return join(
        [
            element("h2", "Cleaning"),
            element("p", f"{told}. The bars are characters; a rule opens to show examples."),
            element("div", *(_rule(row, row.characters / most) for row in rows), class_="bars"),
        ]
    )


def _rule(row: Dropped, fraction: float) -> Html:
    """Return what a rule took from a source, which opens to show examples."""
    unit = row.unit if row.count == 1 else f"{row.unit}s"
    shown = f"{short(row.count)} {unit} · {short(row.characters)}"
    summary = element("summary", bar(f"{row.rule} in {row.source}", fraction, shown), class_="bar")
    return element("details", summary, *map(_example, row.examples))


def _example(example: Example) -> Html:
    head = element("code", example.id), f" · {example.detail}" if example.detail else ""
    return element("div", *head, element("pre", example.text), class_="example")
