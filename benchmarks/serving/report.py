"""Tables of what was measured, as they stand in RESULTS.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.serving.figures import Figures

Turns = Mapping[str, Sequence[Figures]]
"""The figures of each contestant, turn by turn."""

_HEAD = "tok/s | spread | TTFT p50, ms | p99 | TPOT, ms | gaps p50, ms | p95 | p99 | goodput | errors | client CPU"


def table(title: str, turns: Turns, base: str | None) -> str:
    """Return the medians of each contestant, and its rate as a share of `base`'s in the same turn."""
    lines = [f"| {title} | {_HEAD} | {f'of {base}' if base else ''} |", "|---" * 13 + "|"]
    for name, figures in turns.items():
        median = Figures.median(figures)
        rates = [each.tokens_per_s for each in figures]
        spread = (max(rates) - min(rates)) / median.tokens_per_s
        lines.append(
            f"| {name} | {median.tokens_per_s:,.0f} | {spread:.0%} | {median.ttft_p50_ms:,.1f} | "
            f"{median.ttft_p99_ms:,.1f} | {median.tpot_p50_ms:,.1f} | {median.gap_p50_ms:,.1f} | "
            f"{median.gap_p95_ms:,.1f} | {median.gap_p99_ms:,.1f} | {median.goodput:.0%} | {median.errors} | "
            f"{median.client:.0%} | {_ratio(turns, name, base)} |"
        )
    return "\n".join(lines)


def _ratio(turns: Turns, name: str, base: str | None) -> str:
    """Return the median of the ratios within a turn."""
    if base is None or base == name or base not in turns:
        return ""
    pairs = zip(turns[name], turns[base], strict=True)
    return f"{statistics.median(ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs):.2f}"
