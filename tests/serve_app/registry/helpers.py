"""A model of the registry with numbered versions, and replicas and API processes that report to `Decisions`."""

from __future__ import annotations

from collections.abc import Mapping

from serve_app.registry.decisions import HEARING_S, Decisions, plan_of
from serve_app.registry.facts import Change, Look, Remembered
from serve_app.registry.messages import (
    ApiReport,
    EngineReport,
    ModelSpec,
    ModelVersion,
    ReplicaPlan,
    ReplicaReport,
    ServedModel,
    VersionStatus,
)

SPEC = ModelSpec("llama", "models:/llama@champion", canary_alias="challenger")


def version(number: int) -> ModelVersion:
    """Return version `number` of the model."""
    ref = f"models:/llama/{number}"
    return ModelVersion("llama", ref, ref, number, f"run-{number}", 2.0)


def ref(number: int) -> str:
    """Return the reference of version `number`."""
    return version(number).ref


def look(target: int | None, canary: int | None = None) -> Look:
    """Return an answer of the registry."""
    missing = "models:/llama@champion: 'llama' has no alias 'champion'; its aliases: none"
    return Look(
        None if target is None else version(target),
        None if canary is None else version(canary),
        {} if target is None else {ref(target): ("champion",)},
        missing if target is None else None,
    )


class Application:
    """A follower's decisions, and replicas and API processes that poll; time passes as the test says."""

    def __init__(
        self, spec: ModelSpec = SPEC, remembered: Remembered | None = None, stuck_after_s: float = 60.0
    ) -> None:
        self.now = 0.0
        self.spec = spec
        self.changes: list[Change] = []
        self.decisions = Decisions(
            (spec,),
            {spec.name: remembered} if remembered else {},
            revision=100,
            now=0.0,
            stuck_after_s=stuck_after_s,
        )

    def registry(self, target: int | None, canary: int | None = None) -> None:
        """Let the registry answer."""
        self.decisions.heard(self.spec.name, look(target, canary))
        self.settle()

    def replica(
        self,
        name: str,
        engines: Mapping[int, str] | None = None,
        reason: str | None = None,
        deployment: str = SPEC.deployment,
    ) -> None:
        """Let a replica report the states of its engines."""
        reports = {
            ref(number): EngineReport(state, None if state == "ready" else reason)  # type: ignore[arg-type]
            for number, state in (engines or {}).items()
        }
        report = ReplicaReport(name, f"actor-{name}", deployment, self.spec.name, self.plan_revision, reports)
        self.decisions.replica_reports(report, self.now)
        self.settle()

    def api(self, name: str, *in_use: int, revision: int | None = None, asked: str | None = None) -> None:
        """Let an API process report, by default that it has the newest table."""
        known = self.decisions.table.revision if revision is None else revision
        deployments = frozenset(filter(None, [asked]))
        self.decisions.api_reports(ApiReport(name, known, frozenset(map(ref, in_use)), deployments), self.now)
        self.settle()

    def settle(self) -> None:
        """Let the follower decide."""
        self.changes += self.decisions.settle(self.now)

    def wait(self, seconds: float, **engines: Mapping[int, str]) -> None:
        """Let time pass, in which the replicas `engines` and the API process "api" go on polling."""
        for _ in range(round(seconds)):
            self.now += 1
            for name, states in engines.items():
                self.replica(name, states)
            self.api("api")

    @property
    def plan_revision(self) -> int:
        """The revision of the plan that replicas get now."""
        return self.plan().revision

    @property
    def wanted(self) -> list[int | None]:
        """The numbers of the versions that replicas are to have."""
        return [version.number for version in self.plan().wanted]

    def plan(self, deployment: str = SPEC.deployment) -> ReplicaPlan:
        """Return the plan of the replicas of `deployment`."""
        return plan_of(self.decisions.plans, self.spec.name, deployment)

    @property
    def served(self) -> ServedModel:
        """The model's part of the table."""
        (served,) = self.decisions.table.models
        return served

    def status(self, number: int) -> VersionStatus | None:
        """Return what the table says of version `number`."""
        return self.served.status(ref(number))

    def state(self, number: int) -> str | None:
        """Return the state of version `number`; None if the table does not list it."""
        status = self.status(number)
        return None if status is None else status.state

    @classmethod
    def serving(cls, number: int, *replicas: str, spec: ModelSpec = SPEC) -> Application:
        """Return an application in which version `number` has been serving for a while."""
        application = cls(spec)
        application.registry(number)
        application.wait(HEARING_S, **{name: {number: "ready"} for name in replicas})
        assert application.served.current == ref(number)
        application.changes.clear()
        return application
