"""A replica's exchange with the follower, over a follower in the same process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from serve_app.registry.messages import ApiReport, ModelVersion, ReplicaPlan, ReplicaReport, Table
from serve_app.replica.engines import Engines
from serve_app.replica.following import Following
from tests.serve_app.replica.helpers import Answers, Loader, ready, running, version

IDENTITY = ReplicaReport("r1", "actor", "LlamaReplica", "tiny")


class Follower:
    """Answers at once who has another revision of the plan, and others when it changes or after `poll_s`."""

    def __init__(self, plan: ReplicaPlan, poll_s: float = 60) -> None:
        self.reports: list[ReplicaReport] = []
        self.away = False
        self._plan, self._poll_s = plan, poll_s
        self._news = asyncio.Event()

    def notify(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def change(self, plan: ReplicaPlan) -> None:
        self._plan = plan
        self.notify()

    async def plan(self, report: ReplicaReport) -> ReplicaPlan:
        self.reports.append(report)
        self.notify()
        if self.away:
            raise ConnectionError("the follower restarts")
        with suppress(TimeoutError):
            async with asyncio.timeout(self._poll_s):
                while self._plan.revision == report.revision:
                    await self._news.wait()
        return self._plan

    async def table(self, report: ApiReport) -> Table:
        raise NotImplementedError

    async def until(self, condition: Callable[[ReplicaReport], bool]) -> None:
        """Wait until the last report is such a one."""
        while not (self.reports and condition(self.reports[-1])):
            await self._news.wait()


def says(ref: str, state: str) -> Callable[[ReplicaReport], bool]:
    return lambda report: ref in report.engines and report.engines[ref].state == state


@asynccontextmanager
async def started(follower: Follower, loader: Loader | None = None) -> AsyncIterator[Engines[Answers]]:
    """The engines of a replica that has started, and follows until the block ends."""
    async with running(loader or Loader()) as engines:
        following = Following(follower, engines, IDENTITY)
        await following.until_ready()
        task = asyncio.create_task(following.forever())
        try:
            yield engines
        finally:
            task.cancel()


def test_a_replica_starts_with_its_most_important_version_and_reports_each_state_at_once(
    versions: list[ModelVersion],
) -> None:
    async def run() -> list[ReplicaReport]:
        follower = Follower(ReplicaPlan(7, tuple(versions[:2])))
        async with started(follower) as engines:
            assert engines.get(versions[0].ref) is not None
            await follower.until(says(versions[1].ref, "ready"))
        return follower.reports

    reports = asyncio.run(run())
    assert reports[0] == IDENTITY
    assert {report.revision for report in reports[1:]} == {7}
    states = [[engine.state for engine in report.engines.values()] for report in reports[1:]]
    assert states == [["loading", "loading"], ["ready", "loading"], ["ready", "ready"]]


def test_a_new_plan_is_carried_out(versions: list[ModelVersion]) -> None:
    async def run() -> None:
        follower = Follower(ReplicaPlan(1, (versions[0],)))
        async with started(follower) as engines:
            follower.change(ReplicaPlan(2, (versions[0], versions[1])))
            await follower.until(says(versions[1].ref, "ready"))
            follower.change(ReplicaPlan(3, (versions[1],)))
            await follower.until(lambda report: report.revision == 3 and len(report.engines) == 1)
            assert engines.get(versions[0].ref) is None
            assert engines.get(versions[1].ref) is not None

    asyncio.run(run())


def test_nothing_changes_while_the_follower_is_away(versions: list[ModelVersion]) -> None:
    async def run() -> None:
        follower = Follower(ReplicaPlan(1, (versions[0],)), poll_s=0.01)
        async with started(follower) as engines:
            follower.away = True
            # Two calls that fail.
            for _ in range(2):
                seen = len(follower.reports)
                await follower.until(lambda _, seen=seen: len(follower.reports) > seen)
            assert engines.get(versions[0].ref) is not None
            follower.away = False
            follower.change(ReplicaPlan(2, tuple(versions[:2])))
            await ready_in(engines, versions[1])

    asyncio.run(run())


async def ready_in(engines: Engines[Answers], version: ModelVersion) -> None:
    await engines.until(lambda: engines.get(version.ref) is not None)


def test_a_replica_starts_although_the_follower_does_so_later(versions: list[ModelVersion]) -> None:
    async def run() -> None:
        follower = Follower(ReplicaPlan(1, (versions[0],)))
        follower.away = True
        async with running(Loader()) as engines:
            starting = asyncio.create_task(Following(follower, engines, IDENTITY).until_ready())
            await follower.until(lambda report: True)
            follower.away = False
            await starting
            assert engines.get(versions[0].ref) is not None

    asyncio.run(run())


def test_a_call_that_has_become_out_of_date_is_not_cancelled(versions: list[ModelVersion]) -> None:
    class Watched(Follower):
        cancelled = 0

        async def plan(self, report: ReplicaReport) -> ReplicaPlan:
            try:
                return await super().plan(report)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

    async def run() -> int:
        follower = Watched(ReplicaPlan(1, (versions[0],)))
        async with started(follower):
            await follower.until(says(versions[0].ref, "ready"))
            return follower.cancelled

    assert asyncio.run(run()) == 0


def test_a_replica_fails_to_start_with_the_reason_of_a_refusal() -> None:
    async def run() -> None:
        async with started(Follower(ReplicaPlan(1, refusal="the registry has no model 'tiny'"))):
            pass

    with pytest.raises(ValueError, match=r"^the registry has no model 'tiny'$"):
        asyncio.run(run())


def test_a_replica_fails_to_start_if_the_only_version_must_not_serve(tmp_path: Path) -> None:
    async def run() -> None:
        follower = Follower(ReplicaPlan(1, (version(tmp_path / "nowhere"),)), poll_s=0.01)
        try:
            async with started(follower):
                pass
        finally:
            # The follower knows it, and had another plan to offer.
            assert follower.reports[-1].engines["nowhere"].state == "failed"

    with pytest.raises(ValueError, match=r"^nowhere cannot be served: .*nowhere is not a directory"):
        asyncio.run(run())


def test_a_replica_starts_with_what_the_follower_falls_back_to(
    versions: list[ModelVersion], tmp_path: Path
) -> None:
    async def run() -> None:
        follower = Follower(ReplicaPlan(1, (version(tmp_path / "nowhere"),)))

        async def fall_back() -> None:
            await follower.until(says("nowhere", "failed"))
            follower.change(ReplicaPlan(2, (versions[0],)))

        falling_back = asyncio.create_task(fall_back())
        async with started(follower) as engines:
            await falling_back
            await ready(engines, versions[0])

    asyncio.run(run())


def test_an_optional_replica_waits_for_another_plan(versions: list[ModelVersion], tmp_path: Path) -> None:
    async def run() -> None:
        follower = Follower(ReplicaPlan(1, (version(tmp_path / "nowhere"),), optional=True), poll_s=0.01)

        async def change() -> None:
            await follower.until(says("nowhere", "failed"))
            # It was told nothing new.
            seen = len(follower.reports)
            await follower.until(lambda _: len(follower.reports) > seen + 1)
            follower.change(ReplicaPlan(2, (versions[0],), optional=True))

        changing = asyncio.create_task(change())
        async with started(follower) as engines:
            await changing
            await ready(engines, versions[0])

    asyncio.run(run())


def test_an_optional_replica_of_which_nothing_is_wanted_starts_without_an_engine(
    versions: list[ModelVersion],
) -> None:
    async def run() -> None:
        follower = Follower(ReplicaPlan(1, optional=True))
        async with started(follower) as engines:
            assert engines.served == []
            follower.change(ReplicaPlan(2, (versions[0],), optional=True))
            await ready_in(engines, versions[0])

    asyncio.run(run())
