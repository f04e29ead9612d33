"""The engines of a replica: one for each version that the follower's plan wants."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from llama_ray.generation.engine import Engine
from llama_ray.tracking.errors import is_passing
from llama_ray.utils.errors import first_line, one_line
from llama_ray.utils.memory import is_out_of_memory, release_memory
from serve_app.errors import cut
from serve_app.registry.messages import EngineInfo, EngineReport, ModelVersion
from serve_app.replica import gate
from serve_app.replica.loader import MAKE_ROOM, EngineLoader, Files, TooLargeError
from serve_app.replica.threads import in_thread

_log = logging.getLogger(__name__)

_LOADING = EngineReport("loading")
_DRAIN_POLL_S = 0.1
"""How often to look whether the last request of a version that is not wanted has ended."""
_LOADING_NICENESS = 10
"""A tenth of a processor's time where engines want all of it: loading takes longer, and streams go on."""
_GATE_GRACE_S = 1.0
"""By which a step that ends too late has said so itself."""
_MAX_REASON = 500


class Served(Protocol):
    """An engine that answers requests."""

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""

    @property
    def ended(self) -> str | None:
        """Why the engine has ended; None while it runs."""

    @property
    def stalled_s(self) -> float:
        """Seconds since the step in progress began, 0 if there is none."""

    def stop(self) -> None:
        """End the engine after its current step."""


ServedT = TypeVar("ServedT", bound=Served)


class _NotWanted(Exception):
    """A version that is being loaded is not wanted any more."""


class _Slot(Generic[ServedT]):
    """A version from the plan that wants it first until its memory is free again."""

    def __init__(self, version: ModelVersion) -> None:
        self.version, self.wanted = version, True
        self.report = _LOADING
        self.served: ServedT | None = None

    @property
    def in_use(self) -> bool:
        """Whether it is wanted, has requests, or is in a step: one that hangs is the watchdog's to end."""
        served = self.served
        busy = served is not None and served.ended is None and (served.open_requests or served.stalled_s)
        return self.wanted or bool(busy)

    def check_wanted(self) -> None:
        if not self.wanted:
            raise _NotWanted


class Engines(Generic[ServedT]):
    """Holds an engine for each version that is wanted, side by side. All methods belong to one event loop.

    `loader` fetches, loads and checks an engine, in threads, and `serve` lets it answer requests. Versions are fetched
    side by side and loaded one at a time, the most important first. What may pass is tried again after `retry_s` (first
    and longest wait, in seconds) for as long as the version is wanted. A version that is not wanted any more takes no
    new requests, and its memory is freed when its last one ends.
    """

    def __init__(
        self,
        loader: EngineLoader,
        serve: Callable[[Engine, ModelVersion], ServedT],
        *,
        retry_s: tuple[float, float] = (5.0, 60.0),
    ) -> None:
        self._loader, self._serve, self._retry_s = loader, serve, retry_s
        self._slots: dict[str, _Slot[ServedT]] = {}
        self._order: list[str] = []
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        # Loads and frees in progress, and frees so far.
        self._loading = self._freeing = self._freed = 0

    @property
    def reports(self) -> Mapping[str, EngineReport]:
        """How far each wanted version is, by its reference."""
        return {ref: slot.report for ref, slot in self._slots.items() if slot.wanted}

    @property
    def can_serve(self) -> bool:
        """Whether the most important version that must not be given up is ready."""
        states = [self._slots[ref].report.state for ref in self._order]
        return next((state == "ready" for state in states if state not in ("failed", "too_large")), False)

    @property
    def served(self) -> list[ServedT]:
        """All engines that may have requests, also of versions that are not wanted any more. For any thread."""
        return [slot.served for slot in list(self._slots.values()) if slot.served is not None]

    def get(self, ref: str) -> ServedT | None:
        """Return what answers new requests for the version `ref`; None if it is not ready, or not wanted."""
        slot = self._slots.get(ref)
        return slot.served if slot is not None and slot.wanted else None

    def apply(self, wanted: Sequence[ModelVersion]) -> None:
        """Begin to load what is wanted, the most important first, and to drop all else."""
        self._order = [version.ref for version in wanted]
        for version in wanted:
            if version.ref not in self._slots:
                slot = self._slots[version.ref] = _Slot(version)
                self._start(self._live(slot))
        for ref, slot in self._slots.items():
            slot.wanted = ref in self._order
        self._notify()

    async def until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Wait until `condition()` holds, which is asked whenever a report changes; at most `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await self._changed.wait()

    async def stop(self) -> None:
        """End all engines; requests in progress fail."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for served in self.served:
            await in_thread("stop", served.stop)

    def _start(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _notify(self) -> None:
        """Wake all that wait for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _report(self, slot: _Slot[ServedT], report: EngineReport) -> None:
        if report != slot.report:
            log = _log.info if report.state in ("loading", "ready") else _log.warning
            log("%s: %s%s", slot.version.ref, report.state, f": {report.reason}" if report.reason else "")
        slot.report = report
        self._notify()

    async def _live(self, slot: _Slot[ServedT]) -> None:
        await self._bring_up(slot)
        while slot.in_use:
            if slot.wanted:
                await self.until(lambda: not slot.wanted)
            else:
                # Requests that end change no report.
                await self.until(lambda: slot.wanted, _DRAIN_POLL_S)
        # From here on a plan that wants the version again loads it again.
        del self._slots[slot.version.ref]
        if slot.served is not None:
            await self._give_back(slot)
            _log.info("%s: freed", slot.version.ref)
        self._freed += 1
        self._notify()

    async def _give_back(self, slot: _Slot[ServedT]) -> None:
        """End the engine, if there is one, and free its memory; nothing is loaded meanwhile."""
        self._freeing += 1
        try:
            if slot.served is not None:
                await in_thread("stop", slot.served.stop)
                slot.served = None
            # Soon done: Ray Serve keeps collections from what was there when the replica started.
            await in_thread("free", release_memory)
        finally:
            self._freeing -= 1
            self._notify()

    async def _bring_up(self, slot: _Slot[ServedT]) -> None:
        """Try until the version is ready, must not serve, or is not wanted any more."""
        wait_s, longest_s = self._retry_s
        while slot.wanted:
            await self._attempt(slot)
            if slot.report.state in ("ready", "failed"):
                return
            if slot.report.state == "too_large":
                await self._until_room(slot, longest_s)
            elif slot.report.state == "retrying":
                await self.until(lambda: not slot.wanted, wait_s)
                wait_s = min(2 * wait_s, longest_s)

    async def _until_room(self, slot: _Slot[ServedT], timeout_s: float) -> None:
        """Wait until an engine has been freed; others on this machine may give back memory, too."""
        freed = self._freed
        await self.until(lambda: not slot.wanted or self._freed > freed, timeout_s)

    async def _attempt(self, slot: _Slot[ServedT]) -> None:
        try:
            files = await in_thread(
                "fetch", lambda: self._loader.fetch(slot.version), niceness=self._niceness
            )
            await self.until(lambda: not slot.wanted or self._may_load(slot))
            slot.check_wanted()
            self._loading += 1
            try:
                info = await self._load(slot, files)
            finally:
                self._loading -= 1
            report = EngineReport("ready", info=info)
        except _NotWanted:
            report = slot.report
        except Exception as error:
            report = _failure(error)
        if slot.served is None:
            # Only now: the error held what had been loaded.
            await self._give_back(slot)
        self._report(slot, report)

    @property
    def _niceness(self) -> int:
        """That of threads which prepare an engine beside others."""
        # Processes of other ranks would inherit it, and with the first engine threads of libraries that all use.
        careful = bool(self.served) and self._loader.options.tensor_parallel == 1
        return _LOADING_NICENESS if careful else 0

    def _may_load(self, slot: _Slot[ServedT]) -> bool:
        """Whether nothing else takes or gives memory, and no version that is more important is about to."""
        if self._loading or self._freeing:
            return False
        before = self._order[: self._order.index(slot.version.ref)]
        return not any(self._slots[ref].report.state == "loading" for ref in before)

    async def _load(self, slot: _Slot[ServedT], files: Files) -> EngineInfo:
        await in_thread("memory", lambda: self._loader.check_room(files))
        engine = await in_thread("load", lambda: self._loader.load(files), niceness=self._niceness)
        try:
            slot.check_wanted()
            info = await self._check(engine, files)
            slot.check_wanted()
        except BaseException:
            await in_thread("close", engine.close)
            raise
        slot.served = self._serve(engine, slot.version)
        return info

    async def _check(self, engine: Engine, files: Files) -> EngineInfo:
        """Let the engine pass the gate; a step that hangs is left behind in its thread."""
        timeout_s = self._loader.gate_timeout_s
        try:
            async with asyncio.timeout(timeout_s + _GATE_GRACE_S):
                return await in_thread("gate", lambda: self._loader.check(engine, files))
        except TimeoutError:
            raise gate.too_slow(timeout_s) from None


def _failure(error: Exception) -> EngineReport:
    """Return the report of a version that could not be loaded."""
    if isinstance(error, TooLargeError):
        return EngineReport("too_large", one_line(error))
    if is_out_of_memory(error):
        return EngineReport("too_large", f"memory ran out while it was loaded; {MAKE_ROOM}")
    if isinstance(error, ValueError):
        reason = one_line(error)
    else:
        reason = f"{type(error).__name__}: {first_line(error)}"
        _log.error("a version cannot be loaded", exc_info=error)
    return EngineReport("retrying" if is_passing(error) else "failed", cut(reason, _MAX_REASON))
