"""Versions of registered models: what one is, and how a reference such as `models:/name@champion` finds it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from llama_ray.tracking.uri import TrackingError, connect

_REF = re.compile(r"models:/(?P<name>[^/:@'\"]+)(?:/(?P<version>[1-9][0-9]*)|@(?P<alias>[\w-]+))")
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter for an alias that is not set
_LISTED = 10  # names or versions that an error message spells out


@dataclass(frozen=True)
class Version:
    """One registered version of a model, with its tags as they were when it was looked up."""

    name: str
    version: int
    run_id: str
    tags: Mapping[str, str]
    description: str = ""

    @property
    def uri(self) -> str:
        """The reference that stays with this version: `models:/name/7`."""
        return f"models:/{self.name}/{self.version}"

    @property
    def validation_loss(self) -> float:
        """Nats per token, on the data of `data_fingerprint`; NaN where no loss is recorded."""
        try:
            return float(self.tags.get("validation_loss", "nan"))
        except ValueError:
            return math.nan

    @property
    def data_fingerprint(self) -> str:
        """Identifies the validation data and its tokenizer; empty where none is recorded."""
        return self.tags.get("data_fingerprint", "")


def check_name(name: str) -> None:
    """Raise TrackingError unless `name` can name a registered model; call it before a long training run."""
    if not re.fullmatch(r"[\w.-]+", name) or name in (".", ".."):
        raise TrackingError(f"{name!r} cannot name a registered model; use letters, digits, '-', '_' and '.'")


def resolve_version(ref: str, uri: str | None = None) -> Version:
    """The version that `models:/name/7` or `models:/name@alias` stands for now.

    Raises TrackingError (a ValueError) for a malformed reference, a name, version or alias that is not there
    (it lists those that are), or a server that does not answer.
    """
    return find(connect(uri), ref)


def latest_version(name: str, uri: str | None = None) -> Version | None:
    """The version of `name` with the highest number; None if it has none or there is no such model."""
    return max(_versions(connect(uri), name), key=lambda version: version.version, default=None)


def find(client: MlflowClient, ref: str) -> Version:
    """`resolve_version` through a client that is there already."""
    match = _REF.fullmatch(ref)
    if match is None:
        raise TrackingError(f"{ref!r} is no model reference; give models:/NAME/VERSION or models:/NAME@ALIAS")
    name, number, alias = match["name"], match["version"], match["alias"]
    try:
        if alias is not None:
            return from_mlflow(client.get_model_version_by_alias(name, alias))
        return from_mlflow(client.get_model_version(name, number))
    except MlflowException as error:
        if error.error_code not in _ABSENT:
            raise
        raise TrackingError(f"{ref}: {_what_there_is(client, name, alias)}") from error


def holder(client: MlflowClient, name: str, alias: str) -> Version | None:
    """The version that holds `alias` now; None if nobody does."""
    try:
        return from_mlflow(client.get_model_version_by_alias(name, alias))
    except MlflowException as error:
        if error.error_code in _ABSENT:
            return None
        raise


def from_mlflow(found: ModelVersion) -> Version:
    """MLflow's record as ours; SQL stores give the number as int, servers as str."""
    return Version(
        found.name, int(found.version), found.run_id or "", dict(found.tags), found.description or ""
    )


def _versions(client: MlflowClient, name: str) -> list[Version]:
    return [from_mlflow(found) for found in client.search_model_versions(f"name='{name}'")]


def _what_there_is(client: MlflowClient, name: str, alias: str | None) -> str:
    try:
        aliases = sorted(client.get_registered_model(name).aliases)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        models = [model.name for model in client.search_registered_models(max_results=_LISTED + 1)]
        return f"no model {name!r} is registered at {client.tracking_uri}; registered: {_listed(models)}"
    if alias is not None:
        return f"{name!r} has no alias {alias!r}; its aliases: {_listed(aliases)}"
    numbers = sorted((version.version for version in _versions(client, name)), reverse=True)
    return f"{name!r} has no such version; its versions: {_listed([str(number) for number in numbers])}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "") if names else "none"
