"""What the follower tells replicas and API processes, decided from what it heard: without Ray, MLflow and a clock."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from serve_app.registry.facts import Change, Look, OutOfReach, Remembered
from serve_app.registry.messages import ApiReport, ModelSpec, ReplicaPlan, ReplicaReport, Table
from serve_app.registry.model_state import ModelState, Moment
from serve_app.registry.replicas import FORGET_S

HEARING_S = 5.0
"""Seconds after which all that live have reported, each two seconds, to a follower that starts or was cut off."""


class Decisions:
    """The state of all models of an application, and of who asks for it.

    Whatever is heard takes effect with the next `settle`. `now` is in seconds of any clock that does not go back;
    `remembered` is what an earlier follower kept, if there was one; `revision`, that of the first table, must be above
    those of its tables.
    """

    def __init__(
        self,
        specs: tuple[ModelSpec, ...],
        remembered: Mapping[str, Remembered],
        *,
        revision: int,
        now: float,
        stuck_after_s: float,
    ) -> None:
        self._models = {
            spec.name: ModelState(spec, remembered.get(spec.name, Remembered()), revision=revision, now=now)
            for spec in specs
        }
        self._stuck_after_s = stuck_after_s
        self._apis: dict[str, tuple[ApiReport, float]] = {}
        self._last_heard = now
        # The first follower of all has nobody to wait for.
        self._hearing_since = now if remembered else -math.inf
        self._first_revision = revision
        self._plans = {name: ReplicaPlan(0) for name in self._models}
        self._table = Table(0, ())
        self.settle(now)

    def heard(self, model: str, answer: Look | OutOfReach) -> None:
        """Take note of what the registry says about `model`."""
        self._models[model].heard(answer)

    def replica_reports(self, report: ReplicaReport, now: float) -> None:
        """Take note of a replica's report."""
        self._note_contact(now)
        if report.model in self._models:
            self._models[report.model].replicas.report(report, now)

    def api_reports(self, report: ApiReport, now: float) -> None:
        """Take note of an API process's report."""
        self._note_contact(now)
        self._apis[report.api] = report, now

    def settle(self, now: float) -> list[Change]:
        """Decide, and return what has changed; the plans and the table are up to date then."""
        self._apis = {name: (api, at) for name, (api, at) in self._apis.items() if now - at < FORGET_S}
        moment = Moment(
            now,
            max(self._table.revision + 1, self._first_revision),
            heard_all=self._is_in_contact(now, HEARING_S),
            in_use=self._in_use,
        )
        changes = [change for model in self._models.values() for change in model.settle(moment)]
        self._publish(moment.revision)
        return changes

    def plan(self, model: str) -> ReplicaPlan:
        """Return what replicas of `model` are to have loaded; revision 0 while nothing is known."""
        if model not in self._models:
            return ReplicaPlan(1, refusal=f"{model} is not among the models of this application")
        return self._plans[model]

    @property
    def table(self) -> Table:
        """What API processes need for routing."""
        return self._table

    def remembered(self) -> dict[str, Remembered]:
        """Return what to keep of each model over a restart."""
        return {name: model.remembered() for name, model in self._models.items()}

    def take_stuck(self, now: float) -> list[ReplicaReport]:
        """Return, once, the last reports of replicas that are silent for `stuck_after_s` while others are heard."""
        if not self._is_in_contact(now, FORGET_S):
            return []
        silent_s = max(self._stuck_after_s, FORGET_S)
        return [report for m in self._models.values() for report in m.replicas.take_silent(silent_s, now)]

    def _note_contact(self, now: float) -> None:
        if now - self._last_heard >= FORGET_S:
            self._hearing_since = now
        self._last_heard = now

    def _is_in_contact(self, now: float, since_s: float) -> bool:
        """Whether somebody was heard all the time for the last `since_s` seconds."""
        return now - self._hearing_since >= since_s and now - self._last_heard < FORGET_S

    def _in_use(self, ref: str, revision: int) -> bool:
        # A revision of the future is that of an earlier follower whose clock was ahead.
        tables = [
            (api, api.revision if api.revision <= self._table.revision else 0)
            for api, _ in self._apis.values()
        ]
        return any(known < revision or ref in api.in_use for api, known in tables)

    def _publish(self, revision: int) -> None:
        table = Table(
            self._table.revision,
            tuple(model.served() for model in self._models.values()),
            max(1, len(self._apis)),
        )
        if table != self._table:
            self._table = replace(table, revision=revision)
        for name, model in self._models.items():
            old = self._plans[name]
            new = ReplicaPlan(old.revision, model.wanted(), model.refusal())
            if new != old:
                self._plans[name] = replace(new, revision=max(old.revision + 1, self._first_revision))
