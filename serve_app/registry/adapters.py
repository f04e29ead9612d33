"""Which adapters clients can ask for: those that the arguments name, and those that the registry has for a version."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from mlflow import MlflowClient

from llama_ray.storage.paths import is_model_ref
from llama_ray.tracking.errors import reported
from llama_ray.tracking.versions import NotRegistered, Version, find, from_mlflow
from serve_app.registry.messages import AdapterVersion, ModelSpec

BASE_TAG = "base"
"""The tag of a registered adapter that names the version it was trained on: `models:/NAME/7`."""


def look_up(
    connected: Callable[[], MlflowClient], spec: ModelSpec, target: str | None
) -> tuple[AdapterVersion, ...]:
    """Return the adapters of a model of which `target` is the registered version that is to serve.

    Those that `spec` names come first, and hide others of the same name. Raises whatever the registry raises.
    """
    found = {name: _named(connected, name, ref) for name, ref in spec.adapters}
    if spec.finds_adapters and target is not None:
        for version in _newest(_trained_on(connected(), target)):
            found.setdefault(version.name, AdapterVersion(version.name, version.uri, target))
    return tuple(found.values())


def unknown(spec: ModelSpec, reason: str) -> tuple[AdapterVersion, ...]:
    """Return what can be said of the adapters that `spec` names while the registry does not answer."""
    return tuple(
        AdapterVersion(name, ref, missing=f"the registry is out of reach ({reason})")
        if is_model_ref(ref)
        else _local(name, ref)
        for name, ref in spec.adapters
    )


def _named(connected: Callable[[], MlflowClient], name: str, ref: str) -> AdapterVersion:
    if not is_model_ref(ref):
        return _local(name, ref)
    try:
        version = find(connected(), ref)
    except NotRegistered as error:
        return AdapterVersion(name, ref, missing=str(error))
    return AdapterVersion(name, version.uri, version.tags.get(BASE_TAG))


def _local(name: str, ref: str) -> AdapterVersion:
    return AdapterVersion(name, ref if "://" in ref else str(Path(ref).expanduser().resolve()))


def _trained_on(client: MlflowClient, target: str) -> list[Version]:
    with reported(f"the adapters of {target} cannot be looked up", "try again later"):
        found = client.search_model_versions(f"tags.`{BASE_TAG}` = '{target}'")
    return [from_mlflow(version) for version in found]


def _newest(versions: Iterable[Version]) -> list[Version]:
    """Return the newest version of each name, by name."""
    newest: dict[str, Version] = {}
    for version in sorted(versions, key=lambda version: version.version):
        newest[version.name] = version
    return sorted(newest.values(), key=lambda version: version.name)
