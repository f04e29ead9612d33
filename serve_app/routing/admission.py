"""Which requests may wait for a replica."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from serve_app.errors import ApiError


class Admission:
    """Counts the requests of each model that no replica has accepted yet.

    `max_queued` limits them by model, over all processes of the API: each of `apis` processes may hold its share.
    None or -1 is no limit.
    """

    def __init__(self, max_queued: Mapping[str, int]) -> None:
        self._max_queued = max_queued
        self._waiting: Counter[str] = Counter()

    def enter(self, model: str, apis: int) -> Place:
        """Return a place in the queue of `model`. Raises ApiError (429) if there is none."""
        limit = self._max_queued.get(model, -1)
        if limit >= 0 and self._waiting[model] >= _share(limit, apis):
            message = "the server's queue of requests is full; try again later"
            raise ApiError(429, message, code="overloaded", retry_after_s=1)
        return Place(self._waiting, model)


class Place:
    """A place in a queue, until `leave` or the end of a `with` block."""

    def __init__(self, waiting: Counter[str], model: str) -> None:
        self._waiting, self.model = waiting, model
        waiting[model] += 1
        self._held = True

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Give the place back; again does nothing."""
        if self._held:
            self._waiting[self.model] -= 1
            self._held = False


def _share(limit: int, apis: int) -> int:
    """Return how many of `limit` one of `apis` processes may hold, so that all together hold no more."""
    return max(limit // max(apis, 1), min(limit, 1))
