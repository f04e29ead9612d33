"""New replicas for a version that does not fit beside the one that serves, for as long as they are needed."""

from __future__ import annotations

from collections.abc import Collection

from serve_app.registry.messages import ModelSpec, ModelVersion
from serve_app.registry.moment import Moment
from serve_app.registry.replicas import Replicas

PLACING_S = 20.0
"""Seconds after which replicas that have not reported wait for room on a node, rather than for their process."""
ROUTABLE_S = 2.0
"""Seconds after which Ray Serve knows that a replica has started."""


class Surge:
    """Which version the replicas of a model's standby have, if there are any.

    Where the version that an alias moved to does not fit beside the one that serves, replicas of the standby load it.
    Once there are as many as the model has otherwise, it serves from there. Then the others let go of the old version,
    which nobody uses, and load the new one, and the standby goes. `version` is what an earlier follower kept of it.
    """

    def __init__(self, spec: ModelSpec, replicas: Replicas, version: ModelVersion | None) -> None:
        self._spec, self._replicas = spec, replicas
        self.version = version if spec.standby else None
        self._since = self._now = 0.0
        # Since when it has replicas enough that are ready.
        self._complete_since: float | None = None
        # The revision of the first table that leads nobody to the standby.
        self._left: int | None = None

    def settle(
        self,
        moment: Moment,
        current: ModelVersion | None,
        target: ModelVersion | None,
        retired: Collection[str],
    ) -> None:
        """Decide, from what serves, what shall serve, and the `ref` of what served and is still used."""
        self._now, standby = moment.now, self._spec.standby
        if standby is None or not moment.heard_all:
            return
        if self._left is not None:
            # The table did not change if it named the standby no longer.
            is_known = moment.is_known(min(self._left, moment.revision - 1))
            # A request that Ray Serve holds for a deployment without replicas would wait for ever.
            if is_known and not moment.is_asked(standby.deployment):
                self.version = self._left = None
            return
        version = self._next(current, target, retired)
        if version is None and self.version is not None:
            self._left = moment.revision
        elif version and not self.has(version):
            self.version, self._since = version, moment.now
        self._complete_since = (self._complete_since or moment.now) if self._is_complete else None

    def has(self, version: ModelVersion | None) -> bool:
        """Whether the standby has `version`, or is to have it."""
        return self.version is not None and version is not None and self.version.ref == version.ref

    def takes_over(self, version: ModelVersion) -> bool:
        """Whether `version` can serve from the standby."""
        since = self._complete_since
        return self.has(version) and since is not None and self._now - since >= ROUTABLE_S

    @property
    def least_replicas(self) -> int:
        """How many replicas the standby is to have at least: as many as the model has otherwise."""
        if self._spec.standby is None or self.version is None:
            return 0
        live = self._replicas.live(self._spec.deployment)
        return min(max(live, 1), self._spec.standby.max_replicas)

    def others_want(
        self,
        wanted: tuple[ModelVersion, ...],
        current: ModelVersion | None,
        target: ModelVersion | None,
    ) -> tuple[ModelVersion, ...]:
        """Return which of the `wanted` versions the replicas that stay are to have: first what only they have."""
        if self.version is None or self._left is not None:
            return wanted
        only_here = tuple(version for version in wanted if not self.has(version))
        taken_back = self.has(target) or (target is None and self.has(current))
        return (*only_here, self.version) if taken_back else only_here

    def ready(self, ref: str) -> dict[str, int]:
        """Return how many replicas can be asked for the version `ref`, by deployment, the best first."""
        counts = self._replicas.ready(ref)
        deployments = [self._spec.deployment]
        if self._spec.standby and self.version and self.version.ref == ref and self._left is None:
            deployments.insert(0, self._spec.standby.deployment)
        return {deployment: counts[deployment] for deployment in deployments}

    def reason(self, version: ModelVersion, current: ModelVersion | None) -> str | None:
        """Return what `version` waits for; None if it is only being loaded."""
        standby = self._spec.standby
        too_large = self._replicas.too_large(version.ref, self._spec.deployment)
        if too_large and self._is_ending:
            return f"{too_large}; new replicas start when those of an earlier version have finished their answers"
        if standby is None or not self.has(version) or current is None:
            return self._replicas.reason(version.ref)
        text = f"does not fit beside {current.ref}" + (f" ({too_large})" if too_large else "")
        live, least = self._replicas.live(standby.deployment), self.least_replicas
        if trouble := self._replicas.reason(version.ref, standby.deployment):
            return f"{text}, and not into a new replica: {trouble}"
        if live < least and self._now - self._since >= PLACING_S:
            return (
                f"{text}, and no node has {standby.needs} free for {least - live} of {least} new replicas; "
                "free that, or add a node"
            )
        return f"{text}; new replicas load it"

    def _next(
        self, current: ModelVersion | None, target: ModelVersion | None, retired: Collection[str]
    ) -> ModelVersion | None:
        """Return which version the standby is to have."""
        if self.version is not None:
            if self.has(current):
                back = self._replicas.all_ready(self.version.ref, self._spec.deployment)
                return None if back else self.version
            if self.has(target) or self.version.ref in retired:
                return self.version
        if current is None or target is None or current.ref == target.ref:
            return None
        if self.version is not None:
            # What the alias moves on to will not fit either.
            return target
        needed = self._replicas.too_large(target.ref, self._spec.deployment) and not self._is_ending
        return target if needed else None

    @property
    def _is_ending(self) -> bool:
        """Whether replicas of an earlier surge still finish their answers: Serve sends them no requests."""
        standby = self._spec.standby
        return self.version is None and standby is not None and self._replicas.live(standby.deployment) > 0

    @property
    def _is_complete(self) -> bool:
        """Whether the standby has its version ready on as many replicas as are needed."""
        standby = self._spec.standby
        if standby is None or self.version is None or self._left is not None:
            return False
        return self._replicas.ready(self.version.ref)[standby.deployment] >= self.least_replicas
