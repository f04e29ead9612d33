"""Which version of one model serves: decided from what the registry and replicas say, without a clock of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from serve_app.registry.facts import Change, Look, OutOfReach, Rejection, Remembered
from serve_app.registry.messages import (
    AdapterVersion,
    EngineInfo,
    ModelSpec,
    ModelVersion,
    ReplicaPlan,
    ServedModel,
    VersionState,
    VersionStatus,
)
from serve_app.registry.moment import Moment
from serve_app.registry.replicas import Replicas
from serve_app.registry.surge import Surge


@dataclass(frozen=True)
class _Retired:
    """A version that serves no longer. It is listed, for who asks for it, until `until` and while it is used; then it
    stays loaded until all API processes know that it is not listed. `revision` is the table's at the last change.
    """

    version: ModelVersion
    until: float
    revision: int
    listed: bool = True


class ModelState:
    """What serves of one model: `current` stays until another version is ready to take its place.

    A version that the registry points to is loaded beside it. It is rejected once a replica finds that it must not
    serve, and then not tried again before the registry has pointed elsewhere. `canary` follows its alias likewise.
    """

    def __init__(self, spec: ModelSpec, remembered: Remembered, *, revision: int, now: float) -> None:
        self.spec = spec
        self.replicas = Replicas()
        self._surge = Surge(spec, self.replicas, remembered.standby)
        self.current, self.canary = remembered.current, remembered.canary
        self._look: Look | None = None
        self._trouble: OutOfReach | None = None
        self._rejected = {rejection.version.ref: rejection for rejection in remembered.rejected}
        until = now + spec.keep_previous_s
        self._retired = {v.ref: _Retired(v, until, revision) for v in remembered.previous}
        self._active = self._find_active()
        self._infos: dict[str, EngineInfo] = {}
        self._adapters: tuple[AdapterVersion, ...] = ()

    def heard(self, answer: Look | OutOfReach) -> None:
        """Take note of what the registry says, or that it does not answer: then all stays as it is."""
        if isinstance(answer, OutOfReach):
            self._trouble = answer
            return
        self._adapters = (*answer.adapters, *self._kept(answer))
        self._look, self._trouble = answer, None
        pointed_to = {version.ref: version for version in (answer.target, answer.canary) if version}
        self._rejected = {
            ref: replace(rejection, lifted=rejection.lifted or ref not in pointed_to)
            for ref, rejection in self._rejected.items()
        }
        # Tags, such as that of the validation loss, can be edited.
        self.current = self.current and pointed_to.get(self.current.ref, self.current)
        self.canary = self.canary and pointed_to.get(self.canary.ref, self.canary)

    def settle(self, moment: Moment) -> list[Change]:
        """Decide, and return what has changed."""
        self.replicas.refresh(moment.now)
        served = _distinct(self.current, self.canary)
        before = self.current, self.canary
        changes = list(self._reject())
        self.current = self._next_current(moment)
        self.canary = self._next_canary(moment)
        self._retire(served, moment)
        self._release(moment)
        self._surge.settle(moment, self.current, self._pointed_to()[0], self._retired)
        infos = {v.ref: self.replicas.info(v.ref) or self._infos.get(v.ref) for v in self.wanted()}
        self._infos = {ref: info for ref, info in infos.items() if info}
        return changes + list(self._compared_to(*before))

    @property
    def is_known(self) -> bool:
        """Whether there is anything to say: what served last, or an answer of the registry."""
        return bool(self.current or self._look or self._trouble)

    def wanted(self) -> tuple[ModelVersion, ...]:
        """Return the versions that replicas are to have loaded, the most important first."""
        return _distinct(*self._active, *(retired.version for retired in self._retired.values()))

    def plans(self) -> dict[str | None, ReplicaPlan]:
        """Return what replicas are to have loaded, those of the standby and (None) all others, without revisions."""
        spec, surge = self.spec, self._surge
        others = surge.others_want(self.wanted(), self.current, self._pointed_to()[0])
        plans: dict[str | None, ReplicaPlan] = {
            None: ReplicaPlan(0, others, self._refusal(), optional=surge.has(self.current))
        }
        if spec.standby is not None:
            standby = (surge.version,) if surge.version else ()
            plans[spec.standby.deployment] = ReplicaPlan(0, standby, optional=True)
        return plans

    @property
    def standby_replicas(self) -> int:
        """How many replicas the standby is to have at least; with 0, it has none."""
        return self._surge.least_replicas

    def _refusal(self) -> str | None:
        """Return why nothing can be served; None if something is wanted, or nothing is known yet."""
        if self.wanted() or not self.is_known:
            return None
        if self._look is None:
            return self._trouble.reason if self._trouble else None
        reasons = [f"{r.version.ref} was rejected: {r.reason}" for r in self._rejected.values()]
        return self._look.missing or "; ".join(reasons) or f"{self.spec.ref} means no version"

    def remembered(self) -> Remembered:
        """Return what to keep over a restart."""
        retired = tuple(retired.version for retired in self._retired.values())
        rejected = tuple(self._rejected.values())
        return Remembered(self.current, self.canary, retired, rejected, self._surge.version)

    def served(self) -> ServedModel:
        """Return the model's part of the table."""
        current, canary = (version.ref if version else None for version in (self.current, self.canary))
        return ServedModel(
            self.spec, current, canary, tuple(self._statuses()), self._notice(), self._adapters
        )

    def _kept(self, look: Look) -> Iterator[AdapterVersion]:
        """Yield adapters that the registry no longer means, and that belong to versions which still answer."""
        found = {(adapter.name, adapter.base) for adapter in look.adapters}
        replaced = {adapter.name for adapter in look.adapters if adapter.missing is None}
        active = {version.ref for version in self.wanted()}
        for adapter in self._adapters:
            is_other_base = look.target is None or adapter.base != look.target.ref
            if adapter.base not in active or (adapter.name, adapter.base) in found:
                continue
            if is_other_base or adapter.name in replaced:
                yield adapter

    def _pointed_to(self) -> tuple[ModelVersion | None, ModelVersion | None]:
        """Return the versions that the registry points to, for all requests and for a share, unless rejected."""
        if self._look is None:
            return None, None
        target, canary = self._look.target, self._look.canary
        return (
            None if target and target.ref in self._rejected else target,
            None if canary and canary.ref in self._rejected else canary,
        )

    def _find_active(self) -> tuple[ModelVersion, ...]:
        return _distinct(self.current, self.canary, *self._pointed_to())

    def _reject(self) -> Iterator[Change]:
        for ref, rejection in list(self._rejected.items()):
            # While a replica speaks of the earlier attempt, its failure cannot be told from one of the next.
            if rejection.lifted and self.replicas.failure(ref) is None:
                del self._rejected[ref]
        # Where nothing serves, a replica that cannot start says so itself.
        if self.current is None:
            return
        serving = {version.ref for version in _distinct(self.current, self.canary)}
        for version in _distinct(*self._pointed_to()):
            reason = self.replicas.failure(version.ref)
            if reason and version.ref not in serving:
                self._rejected[version.ref] = Rejection(version, reason)
                yield Change("rejected", version, reason)

    def _next_current(self, moment: Moment) -> ModelVersion | None:
        target, _ = self._pointed_to()
        if target is None or (self.current and self.current.ref == target.ref):
            return self.current
        if self.current and not (moment.heard_all and self.replicas.all_failed(self.current.ref)):
            return target if moment.heard_all and self._can_serve(target) else self.current
        # Where nothing serves, the first replica that can answer does.
        return target if self.replicas.ready(target.ref) else None

    def _can_serve(self, version: ModelVersion) -> bool:
        beside = self.replicas.all_ready(version.ref, self.spec.deployment)
        return beside or self._surge.takes_over(version)

    def _next_canary(self, moment: Moment) -> ModelVersion | None:
        if self._look is None or self.current is None:
            return self.canary
        if self._look.canary is None or self._look.canary.ref == self.current.ref:
            return None
        _, target = self._pointed_to()
        if target and moment.heard_all and self.replicas.all_ready(target.ref, self.spec.deployment):
            return target
        return None if self.canary and self.canary.ref == self.current.ref else self.canary

    def _retire(self, served: tuple[ModelVersion, ...], moment: Moment) -> None:
        """Keep what served until now, and what others may have asked for by its reference."""
        before, self._active = self._active, self._find_active()
        active = {version.ref for version in self._active}
        for version in _distinct(*served, *before):
            if version.ref in active or version.ref in self._rejected:
                continue
            if self.replicas.all_failed(version.ref):
                continue
            if version in served:
                until = moment.now + self.spec.keep_previous_s
                self._retired[version.ref] = _Retired(version, until, moment.revision)
            # A follower that has just begun has not heard yet who has it ready.
            elif self.replicas.ready(version.ref) or not moment.heard_all:
                self._retired[version.ref] = _Retired(version, moment.now, moment.revision)
        self._retired = {ref: retired for ref, retired in self._retired.items() if ref not in active}

    def _release(self, moment: Moment) -> None:
        """Unlist retired versions whose time is over and which nobody uses, and then drop them."""
        if not moment.heard_all:
            return
        for ref, retired in list(self._retired.items()):
            if moment.now < retired.until or moment.in_use(ref) or not moment.is_known(retired.revision):
                continue
            if retired.listed:
                self._retired[ref] = replace(retired, listed=False, revision=moment.revision)
            else:
                del self._retired[ref]

    def _compared_to(self, current: ModelVersion | None, canary: ModelVersion | None) -> Iterator[Change]:
        """Yield what serves now and did not, and what did and does not."""
        serving = {version.ref for version in _distinct(self.current, self.canary)}
        for version in _distinct(current, canary):
            if version.ref not in serving:
                lost = self.current is None and self.replicas.failure(version.ref)
                yield Change("lost", version, lost) if lost else Change("ended", version)
        if self.current and not (current and current.ref == self.current.ref):
            yield Change("current", self.current)
        if self.canary and not (canary and canary.ref == self.canary.ref):
            yield Change("canary", self.canary)

    def _statuses(self) -> Iterator[VersionStatus]:
        rejected = [r.version for r in self._rejected.values() if not r.lifted]
        listed = [retired.version for retired in self._retired.values() if retired.listed]
        for version in _distinct(*self._active, *rejected, *listed):
            state, reason = self._state(version)
            yield VersionStatus(
                version,
                state,
                aliases=self._look.aliases.get(version.ref, ()) if self._look else (),
                reason=reason,
                ready=self._surge.ready(version.ref),
                info=self._infos.get(version.ref),
            )

    def _state(self, version: ModelVersion) -> tuple[VersionState, str | None]:
        """Return the state of a version and its reason."""
        ref = version.ref
        if ref in self._rejected:
            return "rejected", self._rejected[ref].reason
        if self.current and ref == self.current.ref:
            return "serving", None
        if self.canary and ref == self.canary.ref:
            return "canary", None
        if ref in self._retired:
            return "previous", None
        return "loading", self._surge.reason(version, self.current)

    def _notice(self) -> str | None:
        if self._trouble:
            notice = f"the registry is out of reach since {self._trouble.since} ({self._trouble.reason})"
            last = ", the last one that served"
        elif self._look and self._look.missing:
            notice, last = self._look.missing, ""
        else:
            return None
        return f"{notice}; serving {_spoken(self.current)}{last}" if self.current else notice


def _spoken(version: ModelVersion) -> str:
    return version.ref if version.number is None else f"version {version.number}"


def _distinct(*versions: ModelVersion | None) -> tuple[ModelVersion, ...]:
    """Return the versions that are there, each once, by their `ref`."""
    found: dict[str, ModelVersion] = {}
    for version in versions:
        if version:
            found.setdefault(version.ref, version)
    return tuple(found.values())
