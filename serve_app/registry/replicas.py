"""The live replicas of one model, as their last reports describe them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from serve_app.registry.messages import EngineInfo, EngineReport, ReplicaReport

FORGET_S = 10.0
"""Seconds without a poll after which a replica or an API process counts no longer. They poll every two."""


@dataclass(frozen=True)
class _Seen:
    report: ReplicaReport
    at: float


class Replicas:
    """The last report of each replica of a model. `now` is in seconds of any clock that does not go back."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._live: list[ReplicaReport] = []

    def report(self, report: ReplicaReport, now: float) -> None:
        """Take note of a report."""
        self._seen[report.replica] = _Seen(report, now)

    def refresh(self, now: float) -> None:
        """Forget for the questions below whoever has not reported for `FORGET_S`."""
        self._live = [seen.report for seen in self._seen.values() if now - seen.at < FORGET_S]

    def take_silent(self, silent_s: float, now: float) -> list[ReplicaReport]:
        """Remove and return the last reports of those that have not reported for `silent_s` seconds or more."""
        silent = {name: seen for name, seen in self._seen.items() if now - seen.at >= silent_s}
        self._seen = {name: seen for name, seen in self._seen.items() if name not in silent}
        return [seen.report for seen in silent.values()]

    def ready(self, ref: str) -> Counter[str]:
        """Return how many replicas have the version `ref` loaded, by deployment."""
        return Counter(report.deployment for report in self._live if _is_ready(report, ref))

    def live(self, deployment: str) -> int:
        """Return how many replicas of `deployment` report."""
        return sum(report.deployment == deployment for report in self._live)

    def all_ready(self, ref: str, deployment: str) -> bool:
        """Whether `deployment` has replicas, and all of them have the version `ref` loaded."""
        return 0 < self.live(deployment) == self.ready(ref)[deployment]

    def failure(self, ref: str) -> str | None:
        """Return why a replica says that the version `ref` must not serve; None if none says so."""
        failed = (report for report in self._of(ref) if report.state == "failed")
        return next((report.reason or "it failed" for report in failed), None)

    def all_failed(self, ref: str) -> bool:
        """Whether there are replicas, and all of them say that the version `ref` must not serve."""
        states = [report.engines.get(ref) for report in self._live]
        return bool(states) and all(state is not None and state.state == "failed" for state in states)

    def too_large(self, ref: str, deployment: str) -> str | None:
        """Return why a replica of `deployment` has no room for the version `ref`; None if none says so."""
        states = (report for report in self._of(ref, deployment) if report.state == "too_large")
        return next((report.reason or "there is no room" for report in states), None)

    def reason(self, ref: str, deployment: str | None = None) -> str | None:
        """Return what a load of the version `ref` waits for, as one of the replicas says; None if none says so."""
        return next((report.reason for report in self._of(ref, deployment) if report.reason), None)

    def info(self, ref: str) -> EngineInfo | None:
        """Return what a replica found when it loaded the version `ref`."""
        return next((report.info for report in self._of(ref) if report.info), None)

    def _of(self, ref: str, deployment: str | None = None) -> Iterator[EngineReport]:
        return (
            report.engines[ref]
            for report in self._live
            if ref in report.engines and deployment in (None, report.deployment)
        )


def _is_ready(report: ReplicaReport, ref: str) -> bool:
    return ref in report.engines and report.engines[ref].state == "ready"
