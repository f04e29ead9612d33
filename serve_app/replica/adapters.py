"""The adapters of one engine, loaded when a request asks for them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from llama_ray.generation.adapters.store import LoadedAdapter
from llama_ray.generation.engine import Engine
from llama_ray.tracking.errors import is_passing
from llama_ray.utils.errors import first_line, one_line
from serve_app.errors import cut
from serve_app.registry.messages import AdapterVersion
from serve_app.replica.threads import in_thread

_log = logging.getLogger(__name__)

_RETRY_S = 30.0
"""For so long a request for an adapter that could not be loaded is told why, without another try."""
_NICENESS = 10
"""As of the loading of a version: streams go on."""
_MAX_REASON = 500


class AdapterError(ValueError):
    """An adapter cannot be used; `passing` if it may be there later."""

    def __init__(self, message: str, *, passing: bool) -> None:
        super().__init__(message)
        self.passing = passing


class ServedAdapters:
    """Loads adapters in threads, and keeps the `most` that were used last. All methods belong to one event loop.

    `fetch` returns where the files of a location are on this machine. A request holds what it was given, so that it
    goes on when others take the place of its adapter.
    """

    def __init__(self, engine: Engine, fetch: Callable[[str], Path], most: int) -> None:
        self._engine, self._fetch, self._most = engine, fetch, most
        self._loaded: OrderedDict[str, LoadedAdapter] = OrderedDict()
        self._loading: dict[str, asyncio.Task[LoadedAdapter]] = {}
        self._failed: dict[str, tuple[float, AdapterError]] = {}

    async def get(self, wanted: AdapterVersion) -> LoadedAdapter:
        """Return an adapter, which is loaded first if need be. Raises AdapterError."""
        location = wanted.location
        if (loaded := self._loaded.get(location)) is not None:
            self._loaded.move_to_end(location)
            return loaded
        until, error = self._failed.get(location, (0.0, None))
        if error is not None and time.monotonic() < until:
            # Not itself: its traceback would grow with every request.
            raise AdapterError(str(error), passing=error.passing)
        task = self._loading.get(location)
        if task is None:
            task = self._loading[location] = asyncio.create_task(self._load(location))
            task.add_done_callback(lambda task: self._end(location, task))
        # A client that leaves does not end what others wait for.
        return await asyncio.shield(task)

    async def _load(self, location: str) -> LoadedAdapter:
        try:
            return await in_thread("adapter", lambda: self._add(location), niceness=_NICENESS)
        except Exception as error:
            if not isinstance(error, ValueError):
                _log.error("an adapter cannot be loaded", exc_info=error)
            reason = one_line(error) if isinstance(error, ValueError) else first_line(error)
            raise AdapterError(cut(reason, _MAX_REASON), passing=is_passing(error)) from None

    def _add(self, location: str) -> LoadedAdapter:
        return self._engine.add_adapter(location, self._fetch(location))

    def _end(self, location: str, task: asyncio.Task[LoadedAdapter]) -> None:
        del self._loading[location]
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, AdapterError):
            self._failed[location] = time.monotonic() + _RETRY_S, error
        if error is not None:
            return
        self._failed.pop(location, None)
        self._loaded[location] = task.result()
        while len(self._loaded) > self._most:
            dropped, _ = self._loaded.popitem(last=False)
            self._engine.remove_adapter(dropped)
