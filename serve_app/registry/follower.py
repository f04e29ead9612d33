"""The follower of the registry as a Serve deployment: the exchange, and what of it needs Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

import ray
from ray import serve
from ray.experimental import internal_kv
from ray.serve.metrics import Counter, Gauge

from llama_ray.storage.paths import MODEL_CACHE
from serve_app.registry.exchange import Exchange
from serve_app.registry.facts import Change
from serve_app.registry.messages import ModelSpec, ReplicaReport
from serve_app.registry.record import FileStore, Record, Store
from serve_app.scaling import tell_standby

_NAMESPACE = "llama_ray"
_SERVE_NAMESPACE = "serve"
_RECORDS = MODEL_CACHE / ".serving"
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""For MLflow's client, which would repeat for minutes a request that a server took along: the next look comes soon."""
_log = logging.getLogger(__name__)


class RegistryFollower(Exchange):
    """The one place that decides which versions serve; the application has one replica of it.

    Looks at the registry at `tracking_uri` each `registry_poll_s` seconds; a replica that reports nothing for
    `stuck_after_s` seconds is replaced. `deployed` names this deployment of the application: another one tries rejected
    versions again.
    """

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        tracking_uri: str,
        *,
        registry_poll_s: float = 5.0,
        stuck_after_s: float = 60.0,
        deployed: str = "",
    ) -> None:
        application = serve.get_replica_context().app_name
        for name, value in _IMPATIENT.items():
            os.environ.setdefault(name, value)

        def scale(replicas: Mapping[str, int]) -> None:
            tell_standby(application, deployed, replicas)

        stores: list[Store] = [ClusterStore(), FileStore(_RECORDS)]
        super().__init__(
            specs,
            tracking_uri,
            record=Record(stores, application=application, tracking_uri=tracking_uri, deployed=deployed),
            registry_poll_s=registry_poll_s,
            stuck_after_s=stuck_after_s,
            on_changes=Metrics().count,
            on_stuck=kill,
            on_standby=scale,
        )


class ClusterStore:
    """The key-value store of Ray's head: it outlives any process but the head, and with Redis that, too."""

    def get(self, key: str) -> str | None:
        """Return what is kept, or None."""
        value = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
        return None if value is None else value.decode()

    def put(self, key: str, text: str) -> None:
        """Replace what is kept."""
        internal_kv._internal_kv_put(key, text, namespace=_NAMESPACE)


def kill(report: ReplicaReport) -> None:
    """End a replica that reports no longer, unless it has ended; Serve starts another one in its place."""
    try:
        actor = ray.get_actor(report.actor, namespace=_SERVE_NAMESPACE)
    except ValueError:
        return
    _log.error("%s has not reported for too long; it is ended, and replaced", report.replica)
    ray.kill(actor)


class Metrics:
    """What Ray exports of the follower's decisions, by model."""

    def __init__(self) -> None:
        self._version = Gauge(
            "llama_ray_current_version", description="Version that serves.", tag_keys=("model",)
        )
        self._switches = Counter(
            "llama_ray_switches", description="Versions that began to serve.", tag_keys=("model",)
        )
        self._rejections = Counter(
            "llama_ray_rejections", description="Versions that were rejected.", tag_keys=("model",)
        )

    def count(self, changes: Sequence[Change]) -> None:
        """Take note of decisions."""
        for change in changes:
            tags = {"model": change.version.name}
            if change.kind == "current":
                self._switches.inc(tags=tags)
                self._version.set(change.version.number or 0, tags=tags)
            elif change.kind == "rejected":
                self._rejections.inc(tags=tags)
