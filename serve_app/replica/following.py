"""A replica's side of the exchange with the follower: it reports its engines, and does what the plan says."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Generic

from llama_ray.utils.errors import first_line
from serve_app.registry.messages import Follower, ReplicaPlan, ReplicaReport
from serve_app.replica.engines import Engines, ServedT

_log = logging.getLogger(__name__)

_RETRY_S = 0.5
_PATIENCE_S = 10.0
"""The follower answers within some 2 s; a call that takes this long is given up."""


class Following(Generic[ServedT]):
    """Lets `engines` follow the plans of `follower`; `identity` is the replica's report without revision and engines.

    A report is sent as soon as a state changes. While the follower is away everything stays as it is.
    """

    def __init__(self, follower: Follower, engines: Engines[ServedT], identity: ReplicaReport) -> None:
        self._follower, self._engines, self._identity = follower, engines, identity
        self._revision = 0
        self._is_away = False
        self._abandoned: set[asyncio.Task[ReplicaPlan]] = set()

    async def until_ready(self) -> None:
        """Follow until the most important version is ready; then call `forever`.

        Raises ValueError, with the reason, if the follower says that nothing can be served, or knows that everything
        it wants has failed and wants nothing else. An optional replica does not fail; if nothing is wanted of it, it
        starts, to send away the request that Ray Serve started it for.
        """
        while not self._engines.can_serve:
            report = self._report()
            plan = await self._exchange(report)
            if plan is None:
                continue
            if plan.refusal is not None:
                raise ValueError(plan.refusal)
            states = [report.engines.get(version.ref) for version in plan.wanted]
            reasons = [s.reason for s in states if s is not None and s.state in ("failed", "too_large")]
            if reasons and len(reasons) == len(states) and not plan.optional:
                raise ValueError(f"{plan.wanted[0].ref} cannot be served: {reasons[0]}")
            self._apply(plan)
            if plan.optional and not plan.wanted:
                return

    async def forever(self) -> None:
        """Follow until the task is cancelled."""
        while True:
            plan = await self._exchange(self._report())
            if plan is not None:
                self._apply(plan)

    def _report(self) -> ReplicaReport:
        return replace(self._identity, revision=self._revision, engines=dict(self._engines.reports))

    def _apply(self, plan: ReplicaPlan) -> None:
        # A follower that has just begun knows nothing yet.
        if not plan.revision:
            return
        self._revision = plan.revision
        self._engines.apply(plan.wanted)

    async def _exchange(self, report: ReplicaReport) -> ReplicaPlan | None:
        """Return the follower's answer; None if the report is out of date, or the follower is away for now."""
        call = asyncio.create_task(self._call(report))
        out_of_date = asyncio.create_task(
            self._engines.until(lambda: self._engines.reports != report.engines)
        )
        try:
            await asyncio.wait({call, out_of_date}, timeout=_PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            out_of_date.cancel()
            if not call.done():
                # To cancel a call of Ray may cancel whatever the follower is in the middle of.
                self._abandoned.add(call)
                call.add_done_callback(self._forget)
        if not call.done():
            return None
        try:
            plan = call.result()
        except (Exception, asyncio.CancelledError) as error:
            if not self._is_away:
                _log.warning(
                    "the registry's follower is away; nothing changes until it answers: %s", first_line(error)
                )
            self._is_away = True
            await asyncio.sleep(_RETRY_S)
            return None
        if self._is_away:
            _log.info("the registry's follower answers again")
        self._is_away = False
        return plan

    async def _call(self, report: ReplicaReport) -> ReplicaPlan:
        return await self._follower.plan(report)

    def _forget(self, call: asyncio.Task[ReplicaPlan]) -> None:
        self._abandoned.discard(call)
        # Asks for the error, which asyncio would log otherwise.
        if not call.cancelled():
            call.exception()
