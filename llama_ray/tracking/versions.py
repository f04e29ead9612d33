"""Versions of registered models, and how a reference such as `models:/name@champion` finds one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from llama_ray.tracking.errors import TrackingError, reported
from llama_ray.tracking.uri import connect
from llama_ray.utils.fields import shown

_REF = re.compile(
    r"models:/(?P<name>(?!\.{1,2}[/@])[^/:@'\"]+)(?:/(?P<version>[1-9][0-9]*)|@(?P<alias>[\w-]+))"
)
_NOT_FOUND = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""Error codes of MLflow; the latter is for an alias that is not set."""
_MAX_NAME_BYTES = 200
"""The columns of MLflow's tables have 256 characters, and the name of a folder 255 bytes."""
_LISTED = 10
"""Names or versions that an error message lists."""


class NotRegistered(TrackingError):
    """A reference whose name, version or alias does not exist in a registry that answers."""


@dataclass(frozen=True)
class Version:
    """A registered version of a model, with its tags and aliases at the time of the look-up."""

    name: str
    version: int
    run_id: str
    tags: Mapping[str, str]
    description: str = ""
    aliases: tuple[str, ...] = field(default=(), compare=False)

    @property
    def uri(self) -> str:
        """The reference that always means this version: `models:/name/7`."""
        return f"models:/{self.name}/{self.version}"

    @property
    def validation_loss(self) -> float:
        """Nats per token on the data of `data_fingerprint`; NaN if no loss is recorded."""
        try:
            return float(self.tags.get("validation_loss", "nan"))
        except ValueError:
            return math.nan

    @property
    def data_fingerprint(self) -> str:
        """Identifies the validation data and its tokenizer; empty if none is recorded."""
        return self.tags.get("data_fingerprint", "")


@dataclass(frozen=True)
class ModelRef:
    """A reference to a registered model, taken apart: either `number` or `alias` is set."""

    name: str
    number: int | None
    alias: str | None


def parse_ref(ref: str) -> ModelRef:
    """Take `models:/name/7` or `models:/name@alias` apart. Raises TrackingError for anything else."""
    match = _REF.fullmatch(ref)
    if match is None:
        raise TrackingError(
            f"{shown(ref)} is not a model reference; give models:/NAME/VERSION or models:/NAME@ALIAS"
        )
    number = match["version"]
    return ModelRef(match["name"], None if number is None else int(number), match["alias"])


def check_name(name: str) -> None:
    """Raise TrackingError unless `name` can name a registered model; call it before a long training run."""
    if not re.fullmatch(r"[\w.-]+", name) or name in (".", "..") or len(name.encode()) > _MAX_NAME_BYTES:
        raise TrackingError(
            f"{shown(name)} cannot name a registered model; use at most {_MAX_NAME_BYTES} bytes of letters, digits, "
            "'-', '_' and '.'"
        )


def resolve_version(ref: str, uri: str | None = None) -> Version:
    """Return the version that `models:/name/7` or `models:/name@alias` refers to now.

    Raises TrackingError (a ValueError) for a malformed reference and for a server that does not answer; NotRegistered
    for a name, version or alias that does not exist, with a list of those that do.
    """
    return find(connect(uri), ref)


def latest_version(name: str, uri: str | None = None) -> Version | None:
    """Return the version of `name` with the highest number; None if it has none or the model does not exist."""
    return max(_versions(connect(uri), name), key=lambda version: version.version, default=None)


def version_with_tag(name: str, key: str, value: str, uri: str | None = None) -> Version | None:
    """Return the newest version of `name` whose tag `key` is `value`; None if there is none."""
    found = [version for version in _versions(connect(uri), name) if version.tags.get(key) == value]
    return max(found, key=lambda version: version.version, default=None)


def find(client: MlflowClient, ref: str) -> Version:
    """Do what `resolve_version` does, with an existing client."""
    wanted = parse_ref(ref)
    name, number, alias = wanted.name, wanted.number, wanted.alias
    with reported(f"{ref} cannot be looked up at {client.tracking_uri}", "correct MLFLOW_TRACKING_URI"):
        try:
            if alias is not None:
                return from_mlflow(client.get_model_version_by_alias(name, alias))
            return from_mlflow(client.get_model_version(name, str(number)))
        except MlflowException as error:
            if error.error_code not in _NOT_FOUND:
                raise
            raise NotRegistered(f"{ref}: {_existing_names(client, name, alias)}") from error


def alias_holder(client: MlflowClient, name: str, alias: str) -> Version | None:
    """Return the version that has `alias` now; None if no version has it."""
    try:
        return from_mlflow(client.get_model_version_by_alias(name, alias))
    except MlflowException as error:
        if error.error_code in _NOT_FOUND:
            return None
        raise


def from_mlflow(found: ModelVersion) -> Version:
    """Convert MLflow's record; SQL stores give the number as int, servers as str."""
    return Version(
        found.name,
        int(found.version),
        found.run_id or "",
        dict(found.tags),
        found.description or "",
        tuple(sorted(found.aliases)),
    )


def _versions(client: MlflowClient, name: str) -> list[Version]:
    return [from_mlflow(found) for found in client.search_model_versions(f"name='{name}'")]


def _existing_names(client: MlflowClient, name: str, alias: str | None) -> str:
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
