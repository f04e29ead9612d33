"""When the follower decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """When decisions are made. `revision` is that of the table that they change.

    `heard_all`: all that live have reported by now. `is_known(revision)`: whether all API processes have a table of
    that revision or a later one. `in_use(ref)`: whether one of them has requests on the version `ref`, `is_asked`
    whether one of them has requests that wait for a replica of a deployment.
    """

    now: float
    revision: int
    heard_all: bool
    is_known: Callable[[int], bool]
    in_use: Callable[[str], bool]
    is_asked: Callable[[str], bool]
