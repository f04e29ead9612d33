"""Replicas with room for one engine each, a process of the API, and what Ray Serve does, in steps of a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count

from serve_app.registry.decisions import Decisions, plan_of
from serve_app.registry.facts import Remembered
from serve_app.registry.messages import ApiReport, EngineReport, ModelSpec, ReplicaPlan, ReplicaReport
from serve_app.routing.client import deployment_of
from tests.serve_app.registry.helpers import look

STANDBY = "LlamaStandby"
LOAD_STEPS = 4


@dataclass
class SimulatedReplica:
    """Loads what its plan wants first, for some steps, where it has room: a version that is used takes it up."""

    name: str
    deployment: str
    plan: ReplicaPlan = field(default_factory=lambda: ReplicaPlan(0))
    loaded: str | None = None
    loading: int = 0
    used: int = 0

    @property
    def wanted(self) -> list[str]:
        return [version.ref for version in self.plan.wanted]

    def load(self) -> None:
        if self.loaded not in self.wanted and not self.used:
            self.loaded = None
        if self.loaded is not None or not self.wanted:
            self.loading = 0
        elif self.loading < LOAD_STEPS:
            self.loading += 1
        else:
            self.loaded = self.wanted[0]

    def report(self, model: str) -> ReplicaReport:
        engines = {
            ref: EngineReport("loading") if self.loaded is None else EngineReport("too_large", "no room")
            for ref in self.wanted
        }
        if self.loaded in engines:
            engines[self.loaded] = EngineReport("ready")
        return ReplicaReport(
            self.name, f"actor-{self.name}", self.deployment, model, self.plan.revision, engines
        )


class Simulation:
    """One model whose alias moves. `step` asserts what clients rely on."""

    def __init__(self, spec: ModelSpec, replicas: int) -> None:
        self._spec, self._replicas = spec, replicas
        self._now, self._names = 0.0, count()
        self._target = 1
        self._running: list[SimulatedReplica] = []
        # Those that Serve has stopped, and that finish their answers.
        self._draining: list[SimulatedReplica] = []
        self._requests: list[tuple[str, SimulatedReplica]] = []
        self._killed = False
        self._decisions = self._follower({}, 1000)
        self._table = self._decisions.table

    def _follower(self, remembered: Mapping[str, Remembered], revision: int) -> Decisions:
        return Decisions((self._spec,), remembered, revision=revision, now=self._now, stuck_after_s=60)

    def happen(self, event: str, number: int) -> None:
        """Let something happen: see the test."""
        match event:
            case "alias":
                self._target = number
            case "restart":
                old = self._decisions
                self._decisions = self._follower(old.remembered(), old.table.revision + 1000)
            case "request":
                self._request()
            case "answer":
                self._answer(number)
            case "kill" if self._running:
                self._kill(self._running[number % len(self._running)])
            case "pass":
                for _ in range(number):
                    self.step()

    def run_until_serving(self, number: int) -> None:
        """Start, and wait until version `number` serves."""
        self._target = number
        for _ in range(20):
            self.step()
        assert self._table.models[0].current == f"models:/llama/{number}"

    def step(self) -> None:
        """Let a second pass, in which all poll."""
        self._now += 1
        self._decisions.heard("llama", look(self._target))
        self._scale()
        for replica in (*self._running, *self._draining):
            replica.load()
            self._decisions.replica_reports(replica.report("llama"), self._now)
        # The table that the API has is the last one that it got.
        self._decisions.api_reports(ApiReport("api", self._table.revision, self._in_use), self._now)
        self._decisions.settle(self._now)
        for replica in (*self._running, *self._draining):
            replica.plan = plan_of(self._decisions.plans, "llama", replica.deployment)
        self._check()
        self._table = self._decisions.table

    def answer_all(self) -> None:
        """End all requests."""
        while self._requests:
            self._answer(0)

    @property
    def is_at_rest(self) -> bool:
        """Whether the alias's version serves from the replicas that stay, and no others are left."""
        served = self._decisions.table.models[0]
        return (
            served.current == f"models:/llama/{self._target}"
            and [r.deployment for r in self._running] == [self._spec.deployment] * self._replicas
            and all(replica.loaded == served.current for replica in self._running)
            and self._decisions.standby_replicas() == {STANDBY: 0}
            and self._decisions.remembered()["llama"].previous == ()
        )

    @property
    def _in_use(self) -> frozenset[str]:
        return frozenset(ref for ref, _ in self._requests)

    def _scale(self) -> None:
        """Do what Ray Serve does with the numbers that it is told: a standby only grows until it goes."""
        for deployment, least in {
            self._spec.deployment: self._replicas,
            **self._decisions.standby_replicas(),
        }.items():
            mine = [replica for replica in self._running if replica.deployment == deployment]
            if not least:
                self._running = [replica for replica in self._running if replica not in mine]
                self._draining += mine
            for _ in range(least - len(mine)):
                self._running.append(SimulatedReplica(str(next(self._names)), deployment))
        self._draining = [replica for replica in self._draining if replica.used]

    def _request(self) -> None:
        """Send a request as the API does, with the table that it has."""
        current = self._table.models[0].current
        if current is None:
            return
        deployment = deployment_of(self._table, current)
        having = [r for r in self._running if r.deployment == deployment and r.loaded == current]
        if having:
            having[0].used += 1
            self._requests.append((current, having[0]))

    def _answer(self, number: int) -> None:
        if self._requests:
            _, replica = self._requests.pop(number % len(self._requests))
            replica.used -= 1

    def _kill(self, victim: SimulatedReplica) -> None:
        self._running.remove(victim)
        self._requests = [(ref, replica) for ref, replica in self._requests if replica is not victim]
        self._killed = True

    def _check(self) -> None:
        """Assert that each process of the API finds the version that serves, by the table that it has and by the next.

        No request goes to a standby that is to have no replicas, and as long as no replica was killed, some replica of
        the deployment to which requests go has the version, and some replica that of a request, if its own were lost.
        """
        if not self._killed:
            assert self._in_use <= {replica.loaded for replica in self._running}
        standby = self._decisions.standby_replicas()
        for table in (self._table, self._decisions.table):
            served = table.models[0] if table.models else None
            if served is None or served.current is None:
                continue
            for status in served.versions:
                if not status.answers:
                    continue
                deployment = deployment_of(table, status.version.ref)
                assert standby.get(deployment, 1) > 0, (status, standby)
                if status.version.ref == served.current and not self._killed:
                    having = [r for r in self._running if r.deployment == deployment]
                    assert any(r.loaded == served.current for r in having), (served, self._running)
