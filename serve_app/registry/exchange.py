"""Exchanges reports for plans and tables, looks at the registry, and decides now and then. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from llama_ray.storage.paths import is_model_ref
from serve_app.registry.decisions import Decisions, Plans, plan_of
from serve_app.registry.facts import Change, Remembered
from serve_app.registry.messages import ApiReport, ModelSpec, ReplicaPlan, ReplicaReport, Table
from serve_app.registry.record import Record
from serve_app.registry.watch import Watch

POLL_S = 2.0
"""Seconds after which a call returns without news, so that callers are known to live."""
_TICK_S = 0.5
_RECORD_S = 2.0
"""Seconds that a decision waits for its record: what serves matters more than what a restart knows of it."""
_KEEP_AGAIN_S = 10.0
"""Seconds after which a record that a store did not take is written again."""

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer", ReplicaPlan, Table)


NOTHING = Table(0, ())
"""What a follower says that knows nothing yet."""


class AwakeClock:
    """Counts the seconds in which this process ran: others are not silent while it does not listen."""

    def __init__(self, longest_s: float = 2 * _TICK_S) -> None:
        self.now = 0.0
        self._longest_s, self._read_at = longest_s, time.monotonic()

    def advance(self) -> float:
        """Add the time since the last call, at most the longest that is usual; return the sum."""
        read_at = time.monotonic()
        self.now += min(read_at - self._read_at, self._longest_s)
        self._read_at = read_at
        return self.now


class Exchange:
    """Looks at the registry, hears replicas and API processes, and answers with what to load and what serves.

    Starts with its first call, also where no registry answers. `on_changes` receives decisions, and `on_stuck` a
    replica that is silent for `stuck_after_s`; both are called in a thread, and log what they raise. `on_standby` gets
    how many replicas each standby is to have at least, whenever that changes, and again after it raised.
    """

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        tracking_uri: str,
        *,
        record: Record,
        registry_poll_s: float,
        stuck_after_s: float,
        on_changes: Callable[[Sequence[Change]], None],
        on_stuck: Callable[[ReplicaReport], None],
        on_standby: Callable[[Mapping[str, int]], None],
    ) -> None:
        self._specs, self._poll_s = tuple(specs), registry_poll_s
        # What a directory holds is not worth remembering: it may be another one now.
        self._followed = [spec.name for spec in specs if is_model_ref(spec.ref)]
        self._watch, self._record = Watch(tracking_uri), record
        self._on_changes, self._on_stuck, self._on_standby = on_changes, on_stuck, on_standby
        self._clock = AwakeClock()
        self._decisions = Decisions(
            self._specs,
            {name: kept for name in self._followed if (kept := record.read(name))},
            # Above those of an earlier follower, whose revisions others may know.
            revision=time.time_ns() // 10**6,
            now=self._clock.now,
            stuck_after_s=stuck_after_s,
        )
        self._recorded = self._decisions.remembered()
        # What no store took at the last try, and when to try again.
        self._unkept: dict[str, Remembered] = {}
        self._keep_again = 0.0
        self._table, self._plans = self._decisions.table, self._decisions.plans
        self._news, self._heard, self._look_wanted = asyncio.Event(), asyncio.Event(), asyncio.Event()
        # Looks and tags follow each other; the end of a replica waits for neither.
        self._registry, self._others = ThreadPoolExecutor(1, "registry"), ThreadPoolExecutor(1, "follower")
        self._tasks: list[asyncio.Task[None]] = []

    async def plan(self, report: ReplicaReport) -> ReplicaPlan:
        """Exchange a replica's report for what it is to have loaded, when that is news or after `POLL_S`."""
        self._start()
        self._decisions.replica_reports(report, self._clock.now)
        self._heard.set()
        return await self._when_new(
            lambda: plan_of(self._plans, report.model, report.deployment), report.revision
        )

    async def table(self, report: ApiReport) -> Table:
        """Exchange an API process's report for the table, when that is news or after `POLL_S`."""
        self._start()
        self._decisions.api_reports(report, self._clock.now)
        self._heard.set()
        # API processes may know more, from an earlier follower, than this one has heard.
        return await self._when_new(
            lambda: NOTHING if self._decisions.is_new(self._clock.now) else self._table, report.revision
        )

    async def look_now(self) -> None:
        """Look at the registry without waiting for the next turn: something may have changed."""
        self._start()
        self._look_wanted.set()

    async def check_health(self) -> None:
        """Raise what ended one of the tasks that never end."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def stop(self) -> None:
        """End the tasks, and wait for calls of the registry in progress."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for executor in (self._registry, self._others):
            await asyncio.to_thread(executor.shutdown)

    def _start(self) -> None:
        if not self._tasks:
            loop = asyncio.get_running_loop()
            tasks = (self._follow(), self._decide(), self._scale())
            self._tasks = [loop.create_task(task) for task in tasks]

    async def _when_new(self, read: Callable[[], _Answer], known: int) -> _Answer:
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                # Revision 0 says nothing yet, also to callers that know the words of an earlier follower.
                while read().revision in (0, known):
                    await self._news.wait()
        return read()

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._look_wanted.clear()
            for spec in self._specs:
                answer = await loop.run_in_executor(self._registry, self._watch.look, spec)
                self._decisions.heard(spec.name, answer)
                self._heard.set()
            await _wait(self._look_wanted, self._poll_s)

    async def _decide(self) -> None:
        while True:
            await _wait(self._heard, _TICK_S)
            self._heard.clear()
            now = self._clock.advance()
            changes = self._decisions.settle(now)
            table, plans = self._decisions.table, self._decisions.plans
            await self._keep()
            self._publish(table, plans)
            self._tell(changes)
            for report in self._decisions.take_stuck(now):
                self._others.submit(_logged, self._on_stuck, report)

    async def _keep(self) -> None:
        """Record what serves before anybody knows it: otherwise a restart could go back."""
        loop, remembered = asyncio.get_running_loop(), self._decisions.remembered()
        unkept = {
            name: now
            for name, now in remembered.items()
            if name in self._followed and now != self._recorded.get(name)
        }
        if not unkept or (unkept == self._unkept and loop.time() < self._keep_again):
            return
        self._unkept, self._keep_again = unkept, loop.time() + _KEEP_AGAIN_S
        writes = {
            name: loop.run_in_executor(self._others, self._record.write, name, now)
            for name, now in unkept.items()
        }
        await asyncio.wait(writes.values(), timeout=_RECORD_S)
        for name, write in writes.items():
            if write.done() and write.result():
                self._recorded[name] = unkept[name]

    async def _scale(self) -> None:
        loop, told = asyncio.get_running_loop(), dict[str, int]()
        while True:
            if (wanted := self._decisions.standby_replicas()) != told:
                try:
                    await loop.run_in_executor(self._others, self._on_standby, wanted)
                    told = wanted
                except Exception:
                    _log.exception("the number of replicas cannot be told")
            await asyncio.sleep(_TICK_S)

    def _publish(self, table: Table, plans: Plans) -> None:
        if (table, plans) != (self._table, self._plans):
            self._table, self._plans = table, plans
            self._news.set()
            self._news = asyncio.Event()

    def _tell(self, changes: list[Change]) -> None:
        for change in changes:
            name, ref = change.version.name, change.version.ref
            if change.kind in ("rejected", "lost"):
                _log.warning("%s is %s: %s", ref, change.kind, change.reason)
                self._registry.submit(self._watch.tag, change.version, f"{change.kind}: {change.reason}")
            elif change.kind == "ended":
                self._registry.submit(self._watch.tag, change.version, None)
            else:
                _log.info("%s is what serves %s (%s)", ref, name, change.kind)
                text = "serving" if change.kind == "current" else change.kind
                self._registry.submit(self._watch.tag, change.version, text)
        if changes:
            self._others.submit(_logged, self._on_changes, changes)


_Argument = TypeVar("_Argument")


def _logged(call: Callable[[_Argument], None], argument: _Argument) -> None:
    try:
        call(argument)
    except Exception:
        _log.exception("the follower's call of %s fails", call)


async def _wait(event: asyncio.Event, longest_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(longest_s):
            await event.wait()
