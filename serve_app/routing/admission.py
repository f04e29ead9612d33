"""How many requests may be under way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from serve_app.errors import ApiError


@dataclass(frozen=True)
class QueueLimit:
    """Of one model: a replica works on `max_ongoing` requests, and `max_queued` wait in all; -1 is no limit."""

    max_ongoing: int
    max_queued: int


class Admission:
    """Counts the requests under way of each model, and limits them to what its replicas take and what may wait.

    The processes of the API cannot see each other's requests; each one gets an equal share of the places.
    """

    def __init__(self, limits: Mapping[str, QueueLimit]) -> None:
        self._limits = limits
        self._under_way: Counter[str] = Counter()

    def enter(self, model: str, replicas: int, apis: int) -> Place:
        """Return a place for a request of `model`, which has `replicas` that are ready; `leave` it at the end.

        Raises ApiError (429) if all of this one of `apis` processes are taken.
        """
        limit = self._limits.get(model)
        if limit is not None and limit.max_queued >= 0:
            places = (replicas * limit.max_ongoing + limit.max_queued) // apis
            if self._under_way[model] >= max(places, 1):
                message = "the server's queue of requests is full; try again later"
                raise ApiError(429, message, code="overloaded", retry_after_s=1)
        return Place(self._under_way, model)


class Place:
    """A place until the end of a `with` block."""

    def __init__(self, under_way: Counter[str], model: str) -> None:
        self._under_way, self.model = under_way, model
        under_way[model] += 1

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *error: object) -> None:
        self._under_way[self.model] -= 1
