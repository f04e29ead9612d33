"""The follower of the registry as other processes of the application reach it: by a handle of Ray Serve."""

from __future__ import annotations

from typing import Any

from ray.serve.handle import DeploymentHandle

from serve_app.registry.messages import ApiReport, ReplicaPlan, ReplicaReport, Table


class FollowerHandle:
    """The follower behind `handle`. Its calls raise what Ray raises while the follower is away.

    They go by gRPC. By Ray's own transport one thread of the follower would send all answers, and wait with each until
    it has arrived: a caller whose process is stopped would keep the follower from hearing of anybody, for ever.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        # It has no public name. Where Ray is started with `serve.env`, and the driver, too, it is the default.
        self._handle = handle.options(_by_reference=False)

    async def plan(self, report: ReplicaReport) -> ReplicaPlan:
        """See `Follower`."""
        plan: ReplicaPlan = await self._handle.plan.remote(report)
        return plan

    async def table(self, report: ApiReport) -> Table:
        """See `Follower`."""
        table: Table = await self._handle.table.remote(report)
        return table
