"""The table of what is served, as this process of the API knows it, and what its open requests use."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from serve_app.errors import ApiError
from serve_app.registry.messages import ApiReport, Follower, Table
from serve_app.routing.cancellation import raise_if_cancelled

_log = logging.getLogger(__name__)

_RETRY_S = 0.5
_FIRST_TABLE_S = 30.0
"""How long a request waits for the first table."""


class Tables:
    """Exchanges reports for tables with the follower, for ever; `watch` runs as a task.

    While the follower is away (it restarts), the last table stays.
    """

    def __init__(self, follower: Follower, api: str) -> None:
        self.table: Table | None = None
        self._follower, self._api = follower, api
        self._in_use: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()
        self._first = asyncio.Event()

    async def watch(self) -> None:
        """Keep the table up to date."""
        away = False
        while True:
            try:
                table = await self._follower.table(self._report())
                # A follower that has just begun knows nothing yet.
                if table.revision:
                    self.table = table
                    self._first.set()
                away = False
            except (Exception, asyncio.CancelledError) as error:
                raise_if_cancelled()
                if not away:
                    _log.warning("the registry's follower does not answer; the last table stays: %s", error)
                away = True
                await asyncio.sleep(_RETRY_S)

    async def current(self) -> Table:
        """Return the table. Raises ApiError (503) if there is none yet and none comes."""
        if self.table is None:
            try:
                async with asyncio.timeout(_FIRST_TABLE_S):
                    await self._first.wait()
            except TimeoutError:
                raise ApiError(
                    503, "the server is starting; try again later", code="unavailable", retry_after_s=5
                ) from None
        assert self.table is not None
        return self.table

    def using(self, ref: str) -> AbstractContextManager[None]:
        """Count a request of the version `ref`, which stays loaded meanwhile."""
        return _counted(self._in_use, ref)

    def asking(self, deployment: str) -> AbstractContextManager[None]:
        """Count a request that waits for a replica of `deployment`, which keeps its replicas meanwhile."""
        return _counted(self._asked, deployment)

    def _report(self) -> ApiReport:
        revision = 0 if self.table is None else self.table.revision
        return ApiReport(self._api, revision, frozenset(self._in_use), frozenset(self._asked))


@contextmanager
def _counted(counter: Counter[str], key: str) -> Iterator[None]:
    counter[key] += 1
    try:
        yield
    finally:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]
