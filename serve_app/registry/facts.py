"""What the follower learns from the registry, what it keeps over a restart, and what it decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from serve_app.registry.messages import AdapterVersion, ModelVersion


@dataclass(frozen=True)
class Look:
    """What the registry says about a model: the version that its reference means, and that of its canary alias.

    `aliases` maps the `ref` of both to all their aliases. `missing` says why there is no `target`. `adapters` are those
    that clients can ask for.
    """

    target: ModelVersion | None = None
    canary: ModelVersion | None = None
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    missing: str | None = None
    adapters: tuple[AdapterVersion, ...] = ()


@dataclass(frozen=True)
class OutOfReach:
    """The registry has not answered since `since`, a time for people; `reason` is one line."""

    since: str
    reason: str


@dataclass(frozen=True)
class Rejection:
    """A version that must not serve, and why. It is tried again once the aliases have pointed elsewhere (`lifted`)."""

    version: ModelVersion
    reason: str
    lifted: bool = False


@dataclass(frozen=True)
class Remembered:
    """What the follower keeps of a model over a restart, its own and that of the application.

    `previous` are versions that replicas may have loaded still, for streams that use them, and `standby` is the one
    that those of the standby have.
    """

    current: ModelVersion | None = None
    canary: ModelVersion | None = None
    previous: tuple[ModelVersion, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    standby: ModelVersion | None = None


@dataclass(frozen=True)
class Change:
    """A decision for people and metrics: a version is "current" or "canary" now, "ended" as one of them, or "rejected";
    "lost": it served, and no replica can load it any longer.
    """

    kind: Literal["current", "canary", "ended", "rejected", "lost"]
    version: ModelVersion
    reason: str | None = None
