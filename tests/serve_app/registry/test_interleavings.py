"""Aliases move, loads end and fail, processes come and go, and the follower restarts, in any order."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from serve_app.registry.decisions import HEARING_S, Decisions, plan_of
from serve_app.registry.facts import Change, OutOfReach
from serve_app.registry.messages import ApiReport, EngineReport, ModelSpec, ReplicaReport, Table
from serve_app.registry.replicas import FORGET_S
from tests.serve_app.registry.helpers import look, ref

VERSIONS = (1, 2, 3, 4)
BAD = {ref(4)}
"""Versions that fail whenever they are loaded."""
NAME, DEPLOYMENT = "llama", "LlamaReplica"
ALIASES = st.sampled_from((*VERSIONS, *VERSIONS, None))


@dataclass
class Replica:
    """A replica that has what its last plan wanted, and the last report that the follower has of it."""

    engines: dict[str, str] = field(default_factory=dict)
    revision: int = 0
    reported: dict[str, str] = field(default_factory=dict)


@dataclass
class Api:
    """An API process with its last table, and what its open requests use."""

    table: Table = field(default_factory=lambda: Table(0, ()))
    in_use: list[str] = field(default_factory=list)
    reported: list[str] = field(default_factory=list)


class Interleavings(RuleBasedStateMachine):
    """Whatever happens, what serves is ready, stays where it is used, and moves with the alias only."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.alias: int | None = None
        self.canary: int | None = None
        self.target: str | None = None
        self.switches = 0
        self.replicas: dict[int, Replica] = {}
        self.apis: dict[int, Api] = {}
        self.tables: dict[int, Table] = {}
        self.started = 0

    def follower(self, remembered: dict, revision: int) -> Decisions:  # type: ignore[type-arg]
        return Decisions((self.spec,), remembered, revision=revision, now=self.now, stuck_after_s=60)

    @property
    def current(self) -> str | None:
        return self.decisions.table.models[0].current

    def settle(self) -> None:
        before = self.current
        for change in self.decisions.settle(self.now):
            self.check(change, before)
        table = self.decisions.table
        assert self.tables.setdefault(table.revision, table) == table
        assert table.revision == max(self.tables)

    def check(self, change: Change, before: str | None) -> None:
        new = change.version.ref
        if change.kind != "current":
            return
        assert new == self.target
        self.switches += 1
        assert self.switches <= 1
        states = [replica.reported.get(new) for replica in self.replicas.values()]
        assert "ready" in states
        assert before is None or set(states) == {"ready"}

    @rule(champion=ALIASES, canary=ALIASES)
    def move(self, champion: int | None, canary: int | None) -> None:
        if champion != self.alias:
            self.alias, self.switches = champion, 0
        self.target = None if champion is None else ref(champion)
        self.canary = canary
        self.look_again()

    def look_again(self) -> None:
        self.decisions.heard(NAME, look(self.alias, self.canary))
        self.settle()

    def lose_the_registry(self) -> None:
        self.decisions.heard(NAME, OutOfReach("today", "it is away"))
        self.settle()

    @initialize(keep_previous_s=st.sampled_from((0.0, 3.0)))
    def start(self, keep_previous_s: float) -> None:
        self.spec = ModelSpec(
            NAME, "models:/llama@champion", canary_alias="challenger", keep_previous_s=keep_previous_s
        )
        self.decisions = self.follower({}, 1)
        for _ in range(2):
            self.start_replica()
        self.start_api()
        self.move(1, None)
        self.wait(1)
        self.load_all(False)

    def start_replica(self) -> None:
        self.started += 1
        self.replicas[self.started] = Replica()
        self.poll(self.started)

    def start_api(self) -> None:
        self.started += 1
        self.apis[self.started] = Api()
        self.poll(self.started)

    @rule(data=st.data(), number=st.integers(0, 5))
    def trouble(self, data: st.DataObject, number: int) -> None:
        """Let processes come and go, and the registry."""
        happenings = (
            self.start_replica,
            self.start_api,
            self.restart_the_follower,
            self.lose_the_registry,
            self.look_again,
            lambda: self.kill(data),
        )
        happenings[number]()

    def kill(self, data: st.DataObject) -> None:
        name = self.any_of(data, (*self.replicas, *self.apis))
        self.apis.pop(name, None)
        if self.replicas.pop(name, None):
            # The follower counts it for a while still, which only delays what it does.
            self.wait(round(FORGET_S))

    @rule(data=st.data(), state=st.sampled_from(("ready", "ready", "ready", "retrying", "too_large")))
    def load(self, data: st.DataObject, state: str) -> None:
        name = self.any_of(data, tuple(self.replicas))
        engines = self.replicas[name].engines if name else {}
        for version, before in engines.items():
            if before not in ("ready", "failed"):
                engines[version] = "failed" if version in BAD else state
        self.poll(name)

    @rule(but_one=st.booleans())
    def load_all(self, but_one: bool) -> None:
        """Let all loads of all replicas end, or of all but one."""
        self.poll_all()
        for name in tuple(self.replicas)[but_one:]:
            for version in self.replicas[name].engines:
                self.replicas[name].engines[version] = "failed" if version in BAD else "ready"
        self.poll_all()

    @rule(data=st.data())
    def poll_one(self, data: st.DataObject) -> None:
        self.poll(self.any_of(data, (*self.replicas, *self.apis)))

    @rule(data=st.data(), begin=st.booleans())
    def request(self, data: st.DataObject, begin: bool) -> None:
        """Begin requests for a version that the table offers, or end all."""
        api = self.apis.get(self.any_of(data, tuple(self.apis)), Api())
        offered = [
            status.version.ref for model in api.table.models for status in model.versions if status.answers
        ]
        if begin and offered:
            api.in_use.append(data.draw(st.sampled_from(offered)))
        else:
            api.in_use.clear()

    @staticmethod
    def any_of(data: st.DataObject, names: tuple[int, ...]) -> int:
        return data.draw(st.sampled_from(names)) if names else 0

    def restart_the_follower(self) -> None:
        self.decisions = self.follower(self.decisions.remembered(), self.decisions.table.revision + 100)
        self.tables[self.decisions.table.revision] = self.decisions.table

    @rule(seconds=st.integers(1, 6))
    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            self.poll_all()

    def poll_all(self) -> None:
        for name in (*self.replicas, *self.apis):
            self.poll(name)

    def poll(self, name: int) -> None:
        if not name:
            return
        if name in self.apis:
            api = self.apis[name]
            api.reported = list(api.in_use)
            report = ApiReport(str(name), api.table.revision, frozenset(api.in_use))
            self.decisions.api_reports(report, self.now)
            self.settle()
            api.table = self.decisions.table
            return
        replica = self.replicas[name]
        replica.reported = dict(replica.engines)
        engines = {
            version: EngineReport(state, "reason")  # type: ignore[arg-type]
            for version, state in replica.engines.items()
        }
        self.decisions.replica_reports(
            ReplicaReport(str(name), "actor", DEPLOYMENT, NAME, replica.revision, engines), self.now
        )
        self.settle()
        plan = plan_of(self.decisions.plans, NAME, DEPLOYMENT)
        replica.revision = plan.revision
        replica.engines = {
            version.ref: replica.engines.get(version.ref, "loading") for version in plan.wanted
        }

    @invariant()
    def what_was_rejected_serves_nobody(self) -> None:
        for table in self.decisions.table.models:
            rejected = {status.version.ref for status in table.versions if status.state == "rejected"}
            assert not rejected & {table.current, table.canary}
            assert not BAD & {table.current, table.canary}

    @invariant()
    def what_is_used_stays_loaded(self) -> None:
        wanted = {version.ref for version in plan_of(self.decisions.plans, NAME, DEPLOYMENT).wanted}
        for api in self.apis.values():
            assert set(api.reported) & set(api.in_use) <= wanted

    def teardown(self) -> None:
        """Whatever has happened, the version that the alias means serves in the end, unless it is bad."""
        if not self.replicas:
            self.start_replica()
        self.look_again()
        for _ in range(round(HEARING_S + FORGET_S) + 2):
            for replica in self.replicas.values():
                for name in replica.engines:
                    replica.engines[name] = "failed" if name in BAD else "ready"
            self.now += 1
            self.poll_all()
        if self.target is not None and self.target not in BAD:
            assert self.current == self.target


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
