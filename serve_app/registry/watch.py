"""Looks at the MLflow registry: which versions the references of the served models mean."""

from __future__ import annotations

import logging
import math
from datetime import UTC, datetime
from pathlib import Path

from mlflow import MlflowClient

from llama_ray.storage.paths import is_model_ref, is_uri, model_name
from llama_ray.tracking.errors import TrackingError, reported
from llama_ray.tracking.uri import check_answers, connect
from llama_ray.tracking.versions import NotRegistered, Version, alias_holder, find, parse_ref
from llama_ray.utils.errors import first_line
from serve_app.registry import adapters
from serve_app.registry.facts import Look, OutOfReach
from serve_app.registry.messages import AdapterVersion, ModelSpec, ModelVersion

SERVING_TAG = "llama_ray.serving"
"""The tag of a version that says whether it serves, or why it must not."""
_TAG_CHARACTERS = 1000

_log = logging.getLogger(__name__)


class Watch:
    """The registry at `tracking_uri`, which need not answer yet.

    The methods block, for some seconds each where nothing answers. They raise nothing; one thread at a time calls them.
    """

    def __init__(self, tracking_uri: str) -> None:
        self._uri = tracking_uri
        self._client: MlflowClient | None = None
        self._away_since: datetime | None = None

    def look(self, spec: ModelSpec) -> Look | OutOfReach:
        """Return which versions a model's reference and its canary alias mean now; a directory needs no registry."""
        if not is_model_ref(spec.ref):
            return Look(directory_version(spec), adapters=self._adapters_of_directory(spec))
        try:
            name = parse_ref(spec.ref).name
        except TrackingError as error:
            return Look(missing=str(error))
        try:
            look = self._look_up(spec, name)
        # Each kind of store raises the exceptions of its own libraries.
        except Exception as error:
            if self._away_since is None:
                self._away_since = datetime.now(UTC)
                _log.warning("the registry is out of reach: %s", first_line(error))
            return OutOfReach(f"{self._away_since:%Y-%m-%d %H:%M:%S} UTC", first_line(error))
        if self._away_since is not None:
            _log.info("the registry answers again")
            self._away_since = None
        return look

    def tag(self, version: ModelVersion, text: str | None) -> None:
        """Say on the version's page in MLflow whether it serves; None says nothing any longer. Errors are logged."""
        if version.number is None:
            return
        try:
            client, name = self._connected(), parse_ref(version.ref).name
            if text is None:
                client.delete_model_version_tag(name, str(version.number), SERVING_TAG)
            else:
                text = text[:_TAG_CHARACTERS]
                client.set_model_version_tag(name, str(version.number), SERVING_TAG, text)
        except Exception as error:
            _log.warning("the tag %s of %s cannot be set: %s", SERVING_TAG, version.ref, first_line(error))

    def _look_up(self, spec: ModelSpec, name: str) -> Look:
        client = self._connected()
        target, missing = None, None
        try:
            target = find(client, spec.ref)
        except NotRegistered as error:
            missing = str(error)
        canary = None
        if spec.canary_alias:
            with reported(f"models:/{name}@{spec.canary_alias} cannot be looked up", "try again later"):
                canary = alias_holder(client, name, spec.canary_alias)
        return Look(
            None if target is None else _model_version(spec, target),
            None if canary is None else _model_version(spec, canary),
            {version.uri: version.aliases for version in (target, canary) if version},
            missing,
            adapters.look_up(self._connected, spec, None if target is None else target.uri),
        )

    def _adapters_of_directory(self, spec: ModelSpec) -> tuple[AdapterVersion, ...]:
        try:
            return adapters.look_up(self._connected, spec, None)
        except Exception as error:
            # The model itself needs no registry.
            return adapters.unknown(spec, first_line(error))

    def _connected(self) -> MlflowClient:
        if self._client is None:
            self._client = connect(self._uri)
        else:
            # MLflow's client itself would try for minutes.
            check_answers(str(self._client.tracking_uri))
        return self._client


def directory_version(spec: ModelSpec) -> ModelVersion:
    """Return the version that stands for the directory of `spec`, or for what is at its URI."""
    if is_uri(spec.ref):
        return ModelVersion(spec.name, model_name(spec.ref), spec.ref)
    directory = Path(spec.ref).expanduser().resolve()
    return ModelVersion(spec.name, directory.name, str(directory))


def _model_version(spec: ModelSpec, version: Version) -> ModelVersion:
    loss = version.validation_loss
    return ModelVersion(
        spec.name,
        version.uri,
        version.uri,
        version.version,
        version.run_id or None,
        loss if math.isfinite(loss) else None,
    )
