"""What the follower tells replicas and API processes, decided from what it heard: without Ray, MLflow and a clock."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from serve_app.registry.facts import Change, Look, OutOfReach, Remembered
from serve_app.registry.messages import ApiReport, ModelSpec, ReplicaPlan, ReplicaReport, Table
from serve_app.registry.model_state import ModelState
from serve_app.registry.moment import Moment
from serve_app.registry.replicas import FORGET_S

HEARING_S = 5.0
"""Seconds after which all that live have reported, each two seconds, to a follower that starts or was cut off."""

Plans = Mapping[tuple[str, str | None], ReplicaPlan]
"""What replicas are to have loaded, by model and deployment; that of None is for all deployments without their own."""


def plan_of(plans: Plans, model: str, deployment: str) -> ReplicaPlan:
    """Return the plan for a replica."""
    unknown = ReplicaPlan(1, refusal=f"{model} is not among the models of this application")
    return plans.get((model, deployment)) or plans.get((model, None), unknown)


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
        self._plans: dict[tuple[str, str | None], ReplicaPlan] = {}
        self._table = Table(0, ())
        self._began = now
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
            is_known=self._is_known,
            in_use=lambda ref: any(ref in api.in_use for api, _ in self._apis.values()),
            is_asked=lambda deployment: any(deployment in api.asked for api, _ in self._apis.values()),
        )
        changes = [change for model in self._models.values() for change in model.settle(moment)]
        self._publish(moment.revision)
        return changes

    @property
    def plans(self) -> Plans:
        """What replicas are to have loaded: see `plan_of`. Revision 0 while nothing is known."""
        return dict(self._plans)

    def standby_replicas(self) -> dict[str, int]:
        """Return how many replicas each standby is to have at least, by deployment; with 0, it has none."""
        models = ((model.spec.standby, model) for model in self._models.values())
        return {standby.deployment: model.standby_replicas for standby, model in models if standby}

    def is_new(self, now: float) -> bool:
        """Whether replicas that have what serves may not have said so yet: this follower has just begun."""
        unknown = any(model.current is None for model in self._models.values())
        return unknown and now - self._began < HEARING_S

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

    def _is_known(self, revision: int) -> bool:
        # A revision of the future is that of an earlier follower whose clock was ahead.
        return all(revision <= api.revision <= self._table.revision for api, _ in self._apis.values())

    def _publish(self, revision: int) -> None:
        table = Table(
            self._table.revision,
            tuple(model.served() for model in self._models.values()),
            max(1, len(self._apis)),
        )
        if table != self._table:
            self._table = replace(table, revision=revision)
        for name, model in self._models.items():
            for deployment, plan in model.plans().items():
                old = self._plans.setdefault((name, deployment), ReplicaPlan(0))
                if replace(plan, revision=old.revision) != old:
                    revision = max(old.revision + 1, self._first_revision)
                    self._plans[name, deployment] = replace(plan, revision=revision)
