"""The model registry: register a checkpoint, find a version by reference, and decide which one is the champion."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from llama_ray.tracking.cache import CachedVersion
from llama_ray.tracking.errors import TrackingError, reported
from llama_ray.tracking.fetch import fetch
from llama_ray.tracking.package import check_checkpoint, write_model
from llama_ray.tracking.runs import Run
from llama_ray.tracking.turns import turn
from llama_ray.tracking.uri import connect
from llama_ray.tracking.versions import (
    ModelRef,
    NotRegistered,
    Version,
    alias_holder,
    check_name,
    find,
    from_mlflow,
    latest_version,
    parse_ref,
    resolve_version,
)
from llama_ray.utils.redact import redact

__all__ = [
    "CHAMPION",
    "ModelRef",
    "Policy",
    "PromotionDecision",
    "TrackingError",
    "Version",
    "check_name",
    "current_champion",
    "decide_alias",
    "download",
    "latest_version",
    "parse_ref",
    "promote",
    "register",
    "resolve_version",
]

CHAMPION = "champion"
_MODEL_DESCRIPTION = f"Pre-trained LLaMA models. The alias `{CHAMPION}` marks the version to serve."
Policy = Literal["if_better", "always", "never"]


@dataclass(frozen=True)
class PromotionDecision:
    """Whether the alias moved, and the reason."""

    promoted: bool
    reason: str


def register(
    run: Run,
    *,
    name: str,
    checkpoint: Path,
    python_model: Path,
    validation_loss: float,
    data_fingerprint: str,
    tags: Mapping[str, str],
    description: str,
    confirm: Callable[[], None] = lambda: None,
) -> Version:
    """Register the Hugging Face directory `checkpoint` as the next version of the model `name`.

    `python_model` is a file that defines an `mlflow.pyfunc.PythonModel` and calls `mlflow.models.set_model`. MLflow
    stores its source, so nothing is pickled, and runs it once here as a check. The model finds the checkpoint at
    `context.artifacts["checkpoint"]`; if its `predict` declares `model_input: list[str]`, it receives a list, whether
    the caller passed strings or a data frame. The status of the run does not change. `confirm` is called when all is
    uploaded; what it raises leaves the registry without a new version. Raises ValueError for an invalid
    name or directory, before anything is uploaded, and TrackingError for whatever MLflow or its stores refuse.
    """
    check_name(name)
    check_checkpoint(checkpoint)
    client = connect(run.uri)
    with reported(f"model {name!r} cannot be registered", "correct that, and register it again"):
        _create_registered_model(client, name)
        model_id, location = _log_model(
            client,
            run,
            name=name,
            tags=tags,
            measured=_last_validation(run, validation_loss),
            checkpoint=checkpoint,
            python_model=python_model,
        )
        ours = {"validation_loss": repr(float(validation_loss)), "data_fingerprint": data_fingerprint}
        with _default_uri(run.uri):
            # The UI links a version to its model by a source of this form. With a database URI, MLflow looks it up at
            # the default tracking URI, which set_tracking_uri may have pointed elsewhere.
            confirm()
            linkable = run.uri.startswith("http") or mlflow.get_tracking_uri() == run.uri
            created = client.create_model_version(
                name,
                source=f"models:/{model_id}" if linkable else location,
                run_id=run.run_id,
                tags=ours | dict(tags),
                description=redact(description),
                model_id=model_id,
            )
    return from_mlflow(created)


def _create_registered_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name, description=_MODEL_DESCRIPTION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _last_validation(run: Run, loss: float) -> Metric | None:
    """Return the last point of the run's validation loss that has this value."""
    points = reversed(run.history("loss/validation"))
    return next((point for point in points if math.isclose(point.value, loss)), None)


def _log_model(
    client: MlflowClient,
    run: Run,
    *,
    name: str,
    tags: Mapping[str, str],
    measured: Metric | None,
    checkpoint: Path,
    python_model: Path,
) -> tuple[str, str]:
    """Upload an MLflow model as an output of `run`; return its id and where its artifacts are."""
    logged = client.create_logged_model(
        run.experiment_id,
        name=re.sub(r"[.%\"']", "-", name),
        source_run_id=run.run_id,
        params=dict(client.get_run(run.run_id).data.params),
        tags=dict(tags),
    )
    try:
        step = measured.step if measured else 0
        client.log_outputs(run.run_id, [LoggedModelOutput(logged.model_id, step=step)])
        if measured:
            # The same point again, now tied to the model: the UI shows the loss beside the model's name.
            client.log_batch(run.run_id, metrics=[_of_model(measured, logged.model_id)])
        model = Model(
            artifact_path=logged.artifact_location,
            run_id=run.run_id,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
        )
        with tempfile.TemporaryDirectory() as staging:
            directory = Path(staging, "model")
            write_model(directory, model, checkpoint=checkpoint, python_model=python_model)
            client.log_model_artifacts(logged.model_id, str(directory))
    except BaseException:
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
        raise
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    return logged.model_id, logged.artifact_location


def promote(
    name: str, version: int, *, policy: Policy, uri: str | None = None, alias: str = CHAMPION
) -> PromotionDecision:
    """Point `alias` at `version` if `policy` allows it.

    `if_better` requires a validation loss below that of the alias' current version, measured on the same data; if no
    version has the alias, the new one takes it. A version without a finite loss never takes it, under no policy.
    Raises TrackingError.
    """
    return decide_alias(name, version, lambda new, old: _decide(new, old, policy, alias), uri, alias)


def decide_alias(
    name: str,
    version: int,
    decide: Callable[[Version, Version | None], PromotionDecision],
    uri: str | None = None,
    alias: str = CHAMPION,
) -> PromotionDecision:
    """Point `alias` at `version` if `decide` says so of it and of the version that has the alias, or None.

    No other process decides about an alias of `name` meanwhile, so the two are compared that are then exchanged. What
    `decide` raises ends it. Raises TrackingError.
    """
    client = connect(uri)
    with reported(f"version {version} of {name!r} cannot become {alias}", "set the alias in MLflow's UI"):
        new = find(client, f"models:/{name}/{version}")
        with turn(client, name):
            decision = decide(new, alias_holder(client, name, alias))
            if decision.promoted:
                client.set_registered_model_alias(name, alias, str(version))
    return decision


def current_champion(name: str, uri: str | None = None) -> Version | None:
    """Return the version of `name` that has the alias `champion` now; None without one. Raises TrackingError."""
    client = connect(uri)
    with reported(f"the {CHAMPION} of {name!r} cannot be looked up", "correct MLFLOW_TRACKING_URI"):
        return alias_holder(client, name, CHAMPION)


def download(ref: str, uri: str | None = None, cache_dir: Path | None = None) -> Path:
    """Return the Hugging Face directory of `models:/name/7` or `models:/name@alias` on this machine.

    It is fetched once into `cache_dir` (by default `~/.cache/llama_ray/models`), also if several processes ask at the
    same time, and checked: by its checksums when it arrives, by its sizes whenever it is asked for. If the artifact
    store is a local folder, that folder itself is returned: do not write to it. A version that was returned before is
    found again while the registry is out of reach. No code of the model runs. Raises TrackingError.
    """
    wanted = parse_ref(ref)
    try:
        client = connect(uri)
        version = find(client, ref)
    except NotRegistered:
        raise
    except TrackingError:
        if wanted.number is None:
            raise
        directory = CachedVersion.of(wanted.name, wanted.number, uri, cache_dir).find()
        if directory is None:
            raise
        return directory
    return fetch(client, version.name, version.version, cache_dir)


def _decide(new: Version, old: Version | None, policy: Policy, alias: str) -> PromotionDecision:
    loss, label = new.validation_loss, f"version {new.version}"
    if policy == "never":
        return PromotionDecision(False, "promotion is switched off (--promote never)")
    if not math.isfinite(loss):
        return PromotionDecision(False, f"{label} has validation loss {loss}")
    if old is not None and old.version == new.version:
        return PromotionDecision(False, f"{label} is {alias} already")
    if policy == "always":
        return PromotionDecision(True, f"{label} is promoted whatever its loss ({loss:.4f})")
    if old is None:
        return PromotionDecision(True, f"{label} is the first {alias} (validation loss {loss:.4f})")
    best = old.validation_loss
    versus = f"{loss:.4f} against {best:.4f} of version {old.version}"
    if old.data_fingerprint != new.data_fingerprint or not new.data_fingerprint:
        return PromotionDecision(
            False,
            f"{label} and version {old.version}, the {alias}, were validated on different data, so their losses "
            "do not compare; --promote always moves the alias anyway",
        )
    if loss < best or not math.isfinite(best):
        return PromotionDecision(True, f"{label} is better: validation loss {versus}")
    return PromotionDecision(False, f"{label} is not better: validation loss {versus}")


def _of_model(point: Metric, model_id: str) -> Metric:
    return Metric(point.key, point.value, point.timestamp, point.step, model_id=model_id)


@contextmanager
def _default_uri(uri: str) -> Iterator[None]:
    # mlflow.set_tracking_uri cannot be undone: it leaves the variable set, or deletes the one of the caller.
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before
