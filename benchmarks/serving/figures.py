"""What users see of a load: latencies, rates, and the share of requests that were quick enough."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.peers.workload import percentile
from benchmarks.serving.load import Measured


@dataclass(frozen=True)
class Slo:
    """What a request must keep to be good: milliseconds to the first token, and for each further one."""

    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True)
class Figures:
    """One measurement. TTFT is the time to the first token, TPOT that of each further token of a request; gaps are
    between arrivals of text, which may bring several tokens. `goodput` is a share of all requests; `client` the
    share of one processor that the load generator took.
    """

    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    gap_p50_ms: float
    gap_p95_ms: float
    gap_p99_ms: float
    goodput: float
    errors: int
    client: float

    @classmethod
    def of(cls, measured: Measured, slo: Slo) -> Figures:
        """Return the figures of a measurement; those of tokens are not a number if no request succeeded."""
        good = [o for o in measured.outcomes if o.error is None and o.arrivals]
        first = [1000 * (o.arrivals[0] - o.due) for o in good]
        each = [1000 * (o.arrivals[-1] - o.arrivals[0]) / max(1, o.tokens - 1) for o in good]
        gaps = [1000 * (b - a) for o in good for a, b in pairwise(o.arrivals)]
        kept = sum(a <= slo.ttft_ms and b <= slo.tpot_ms for a, b in zip(first, each, strict=True))
        return cls(
            tokens_per_s=sum(o.tokens for o in measured.outcomes) / measured.seconds,
            ttft_p50_ms=_percentile(first, 50),
            ttft_p99_ms=_percentile(first, 99),
            tpot_p50_ms=_percentile(each, 50),
            gap_p50_ms=_percentile(gaps, 50),
            gap_p95_ms=_percentile(gaps, 95),
            gap_p99_ms=_percentile(gaps, 99),
            goodput=kept / max(1, len(measured.outcomes)),
            errors=len(measured.outcomes) - len(good),
            client=measured.client_cpu_s / measured.seconds,
        )

    @classmethod
    def median(cls, turns: Sequence[Figures]) -> Figures:
        """Return the median of each figure; errors are added up."""
        values = {name: statistics.median(getattr(turn, name) for turn in turns) for name in cls.names()}
        return cls(**values | {"errors": sum(turn.errors for turn in turns)})

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the figures."""
        return list(cls.__dataclass_fields__)


def _percentile(values: Sequence[float], percent: int) -> float:
    return percentile(values, percent) if values else math.nan
