"""What the follower of the registry, the model replicas and the API tell each other. Must not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True)
class Standby:
    """The second deployment of a model, which has no replicas but while a version does not fit beside the one that
    serves. It may have `max_replicas`; `needs` says what a node must have free for one of them, as "1 CPU and 1 GPU".
    """

    deployment: str
    max_replicas: int
    needs: str


@dataclass(frozen=True)
class ModelSpec:
    """A model that the application serves, as its arguments name it.

    `name` is what clients ask for, `deployment` the name of its replicas in Serve. `ref` is a directory,
    `models:/name/7`, or `models:/name@alias`, which is followed. The version that `canary_alias` points to, if any,
    answers `canary_share` (0 to 1) of the requests. A version that no longer serves stays loaded for `keep_previous_s`
    seconds, and at least while requests use it. A model that follows an alias has a `standby`. `adapters` are names and
    references; with `finds_adapters`, so are the registered adapters of the version that serves.
    """

    name: str
    ref: str
    deployment: str = "LlamaReplica"
    canary_alias: str | None = None
    canary_share: float = 0.1
    keep_previous_s: float = 0.0
    standby: Standby | None = None
    adapters: tuple[tuple[str, str], ...] = ()
    finds_adapters: bool = False


@dataclass(frozen=True)
class AdapterVersion:
    """An adapter that clients can ask for, as MODEL:NAME.

    `location` is what a replica loads: `models:/name/3`, or an absolute path. `base` is the version that it was trained
    on, if it is registered and says so. `missing` says why there is none.
    """

    name: str
    location: str
    base: str | None = None
    missing: str | None = None


@dataclass(frozen=True)
class ModelVersion:
    """What a request is answered with: a registered version, or a directory (then `number` is None).

    `ref` identifies it everywhere: `models:/name/7`, or the name of the directory. `location` is what a replica loads:
    the same reference, or the absolute path of the directory. `validation_loss` is in nats per token.
    """

    name: str
    ref: str
    location: str
    number: int | None = None
    run_id: str | None = None
    validation_loss: float | None = None


@dataclass(frozen=True)
class EngineInfo:
    """What a replica found when it loaded a version: `created` is in seconds since 1970, `max_model_len` in tokens of
    prompt and output, `loss` in nats per token of the text that the gate measures it on. `chat_template` says how a
    conversation becomes a prompt: by the checkpoint's own template, or as a plain transcript.
    """

    created: int
    max_model_len: int
    parameters: int
    device: str
    loss: float
    chat_template: Literal["plain", "from the checkpoint"] = "plain"


@dataclass(frozen=True)
class EngineReport:
    """How far a replica is with one version: "loading", "ready", "failed" (it must not serve; `reason` says why),
    "retrying" (something that may pass: a download that broke, a full disk), or "too_large" (no memory for it beside
    what is loaded).
    """

    state: Literal["loading", "ready", "failed", "retrying", "too_large"]
    reason: str | None = None
    info: EngineInfo | None = None


@dataclass(frozen=True)
class ReplicaReport:
    """A replica's side of an exchange with the follower.

    `replica` is Serve's unique id, `actor` the name of its Ray actor, `deployment` the name of its deployment.
    `revision` is that of the plan it has (0: none yet). `engines` maps the `ref` of each version to its state.
    """

    replica: str
    actor: str
    deployment: str
    model: str
    revision: int = 0
    engines: Mapping[str, EngineReport] = field(default_factory=dict)


@dataclass(frozen=True)
class ReplicaPlan:
    """What a replica is to have loaded, the most important first; all else it frees once no request uses it.

    `refusal`: nothing can be served at all, and why; a replica that has nothing loaded fails to start with it. One that
    is `optional` never fails to start: it waits for another plan, because others serve.
    """

    revision: int
    wanted: tuple[ModelVersion, ...] = ()
    refusal: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class ApiReport:
    """An API process's side of an exchange: the revision of the table it has, the versions of each model that its open
    requests use, and the deployments that it asks, where no replica has taken the request yet. A version in use stays
    loaded, so that its streams can move if a replica dies, and a deployment that is asked keeps its replicas.
    """

    api: str
    revision: int = 0
    in_use: frozenset[str] = frozenset()
    asked: frozenset[str] = frozenset()


VersionState = Literal["serving", "canary", "loading", "previous", "rejected"]


@dataclass(frozen=True)
class VersionStatus:
    """A version of a model, its aliases, and its state.

    "previous" is loaded and answers whoever asks for it by its reference. `reason` says why it was rejected, or what a
    load is waiting for. `ready` counts the replicas that have it loaded, by deployment: those that may be asked for it,
    the best first. `info` comes from one of them.
    """

    version: ModelVersion
    state: VersionState
    aliases: tuple[str, ...] = ()
    reason: str | None = None
    ready: Mapping[str, int] = field(default_factory=dict)
    info: EngineInfo | None = None

    @property
    def answers(self) -> bool:
        """Whether requests may go to it."""
        return self.state in ("serving", "canary", "previous")

    @property
    def is_ready(self) -> bool:
        """Whether a replica can answer with it."""
        return any(self.ready.values())


@dataclass(frozen=True)
class ServedModel:
    """A model of the application: which version answers (`current`, None before the first is loaded), which one a
    share of the requests (`canary`), all versions that are known, and the adapters. `notice` says what operators should
    know, such as a registry that is out of reach.
    """

    spec: ModelSpec
    current: str | None
    canary: str | None
    versions: tuple[VersionStatus, ...]
    notice: str | None = None
    adapters: tuple[AdapterVersion, ...] = ()

    def status(self, ref: str) -> VersionStatus | None:
        """Return what is known about the version `ref`."""
        return next((status for status in self.versions if status.version.ref == ref), None)


@dataclass(frozen=True)
class Table:
    """What an API process needs for routing; `apis` is the number of API processes, which share limits."""

    revision: int
    models: tuple[ServedModel, ...]
    apis: int = 1


class Follower(Protocol):
    """The one place that decides which version serves. Both calls return when there is news, or after some seconds."""

    async def plan(self, report: ReplicaReport) -> ReplicaPlan:
        """Exchange a replica's report for what it is to have loaded."""

    async def table(self, report: ApiReport) -> Table:
        """Exchange an API process's report for the table."""
