"""Pictures: bars of HTML, which keep their text at any width, and histograms of SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llama_ray.data.report.html import Html, element, join
from llama_ray.data.report.numbers import share, short

_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 12, 40


def bars(rows: Sequence[tuple[str, float, str]], whole: float | None = None) -> Html:
    """Return a bar for each (name, value, what stands beside it); a full bar is `whole`, by default the largest one."""
    most = whole or max((value for _, value, _ in rows), default=0) or 1
    lines = [element("div", bar(name, value / most, shown), class_="bar") for name, value, shown in rows]
    return element("div", *lines, class_="bars")


def bar(name: str, fraction: float, shown: str) -> Html:
    """Return a name, a bar that is full to this fraction, and what stands beside it."""
    fill = element("span", class_="fill", style=f"width:{max(100 * fraction, 0.4):.2f}%")
    return join(
        [
            element("span", name, class_="name"),
            element("span", fill, class_="track"),
            element("span", shown, class_="value"),
        ]
    )


def histogram(documents: Mapping[int, int], tokens: Mapping[int, int]) -> Html:
    """Draw the shares of documents and of their tokens by length, on a logarithmic axis.

    The keys are bit lengths of numbers of tokens: column 10 is for 512 to 1023 tokens.
    """
    first, last = min(documents), max(documents)
    # A single column would look like a block.
    columns = range(max(first - 1, 1), last + 2)
    sums = sum(documents.values()), sum(tokens.values())
    shares = {
        bits: (documents.get(bits, 0) / sums[0], tokens.get(bits, 0) / max(sums[1], 1)) for bits in columns
    }
    top = _nice(max(max(pair) for pair in shares.values()))
    width = (_WIDTH - _LEFT - _RIGHT) / len(columns)
    parts = [*_scale(top), *_axis(columns, width)]
    for place, bits in enumerate(columns):
        left = _LEFT + place * width
        counts = documents.get(bits, 0), tokens.get(bits, 0)
        for series, (name, count, whole) in enumerate(
            zip(("documents", "tokens"), counts, sums, strict=True)
        ):
            title = f"{_range(bits)} tokens: {count:,} {name}, {share(count, whole)}"
            parts.append(_column(left, width, series, shares[bits][series] / top, title))
    label = "Shares of documents and of tokens by length of the document"
    return element("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label)


def legend() -> Html:
    """Return what the two colours of a histogram mean."""
    names = {"first": "documents of this length", "second": "tokens in documents of this length"}
    keys = [element("span", element("i", class_=f"key {of}"), name) for of, name in names.items()]
    return element("p", *keys, class_="legend")


def _column(left: float, width: float, series: int, fraction: float, title: str) -> Html:
    height = fraction * (_HEIGHT - _TOP - _BOTTOM)
    # Where there is something, there is something to see.
    height = max(height, 1.0) if fraction else 0.0
    return element(
        "rect",
        element("title", title),
        x=f"{left + width * (0.08 + 0.43 * series):.2f}",
        y=f"{_HEIGHT - _BOTTOM - height:.2f}",
        width=f"{width * 0.41:.2f}",
        height=f"{height:.2f}",
        class_="second" if series else "first",
    )


def _scale(top: float) -> list[Html]:
    """Return lines and percentages at the left."""
    parts = []
    for step in range(3):
        y = _TOP + (1 - step / 2) * (_HEIGHT - _TOP - _BOTTOM)
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}"))
        parts.append(
            element("text", f"{100 * top * step / 2:.3g} %", x=_LEFT - 4, y=f"{y + 3.5:.1f}", class_="end")
        )
    return parts


def _axis(columns: range, width: float) -> list[Html]:
    """Return the lengths below the columns, at the left end of each, as many as there is room for."""
    step = -(-len(columns) // 8)
    bottom = _HEIGHT - _BOTTOM
    marks = [
        element(
            "text", _tokens(1 << bits - 1), x=f"{_LEFT + place * width:.1f}", y=bottom + 14, class_="middle"
        )
        for place, bits in enumerate(columns)
        if place % step == 0
    ]
    return [
        *marks,
        element("text", "tokens in a document", x=(_LEFT + _WIDTH) / 2, y=_HEIGHT - 8, class_="middle"),
    ]


def _range(bits: int) -> str:
    return f"{1 << bits - 1:,} to {(1 << bits) - 1:,}" if bits > 1 else "1"


def _tokens(number: int) -> str:
    return f"{number // 1024}k" if 1024 <= number < 2**20 else short(number).replace(" ", "")


def _nice(value: float) -> float:
    """Return a round number at or above `value`, at most 1."""
    return min(number for number in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0) if number >= min(value, 1.0))


def share_bars(counts: Mapping[str, int], most: int) -> Html:
    """Return bars for the `most` frequent names and one for the rest, with their shares."""
    whole = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [(name, float(count), f"{short(count)} · {share(count, whole)}") for name, count in ordered[:most]]
    if rest := sum(count for _, count in ordered[most:]):
        rows.append((f"{len(ordered) - most} others", rest, f"{short(rest)} · {share(rest, whole)}"))
    return bars(rows, whole)


def grid(pictures: Sequence[tuple[str, Html]]) -> Html:
    """Return pictures with their captions, side by side where there is room."""
    figures = [element("figure", element("figcaption", caption), picture) for caption, picture in pictures]
    return element("div", join(figures), class_="grid")
