"""What was measured of a registered version: on the model's page, in the tags of the version, and back again."""

from __future__ import annotations

import json
import re
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT
from mlflow.utils.validation import MAX_DATASET_NAME_SIZE, MAX_METRICS_PER_BATCH

from llama_ray.tracking.errors import reported
from llama_ray.tracking.runs import Run
from llama_ray.tracking.uri import connect
from llama_ray.tracking.versions import Version
from llama_ray.utils.redact import redact

_MODEL_ID = re.compile(r"models:?/(m-[0-9a-f]{32})(?:/|$)")
_NOT_IN_NAMES = re.compile(r"[^/\w.\- :]")


@dataclass(frozen=True)
class Measurement:
    """A number that belongs to a model, and the name and digest of the data that it was measured on."""

    metric: str
    value: float
    data: str
    digest: str


def log_measurements(run: Run, found: Sequence[Measurement], version: Version | None, step: int = 0) -> None:
    """Log `found` as metrics and data sets of `run`, and as metrics of the model that `version` registers.

    The UI shows them on the page of the model and beside its name. Raises TrackingError.
    """
    client = connect(run.uri)
    now_ms = int(time.time() * 1000)
    with reported(f"run {run.run_id} cannot be written", "correct that"):
        model_id = _model_id(client, version) if version else None
        metrics = [
            Metric(
                clean_name(one.metric),
                one.value,
                now_ms,
                step,
                model_id=model_id,
                dataset_name=_dataset_name(one.data),
                dataset_digest=one.digest,
            )
            for one in found
        ]
        for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
            client.log_batch(run.run_id, metrics=metrics[start : start + MAX_METRICS_PER_BATCH])
        context = InputTag(MLFLOW_DATASET_CONTEXT, "evaluation")
        datasets = {(_dataset_name(one.data), one.digest) for one in found}
        client.log_inputs(
            run.run_id,
            [
                DatasetInput(Dataset(name, digest, "local", json.dumps({"task": name})), [context])
                for name, digest in sorted(datasets)
            ],
            [LoggedModelInput(model_id)] if model_id else None,
        )


def log_table(run: Run, columns: Mapping[str, Sequence[object]], path: str) -> None:
    """Store a table as the JSON artifact `path`, in the form that the UI shows as a table. Raises TrackingError."""
    with (
        warnings.catch_warnings(),
        reported(f"artifacts of run {run.run_id} cannot be stored", "correct that storage"),
    ):
        # MLflow 3.17 does not know yet that pandas 3 keeps texts in columns of their own type.
        warnings.filterwarnings("ignore", message=".*'str' dtypes are included by select_dtypes")
        connect(run.uri).log_table(run.run_id, dict(columns), path)


def read_artifact(run_id: str, path: str, uri: str | None = None) -> str | None:
    """Return the text artifact `path` of a run; None if the run or the artifact is gone, or the run was deleted."""
    client = connect(uri)
    try:
        info = client.get_run(run_id).info
        if info.lifecycle_stage == "deleted":
            return None
        with tempfile.TemporaryDirectory() as folder:
            return Path(client.download_artifacts(run_id, path, folder)).read_text(encoding="utf-8")
    except (MlflowException, OSError):
        return None


def replace_tags(version: Version, prefix: str, tags: Mapping[str, str], uri: str | None = None) -> None:
    """Give `version` the tags `prefix` + name, and delete its other tags that begin with `prefix`.

    Raises TrackingError.
    """
    client = connect(uri)
    wanted = {clean_name(prefix + name): redact(value) for name, value in tags.items()}
    with reported(f"the tags of {version.uri} cannot be written", "correct that"):
        number = str(version.version)
        for key in client.get_model_version(version.name, number).tags:
            if key.startswith(prefix) and key not in wanted:
                client.delete_model_version_tag(version.name, number, key)
        for key, value in wanted.items():
            client.set_model_version_tag(version.name, number, key, value)


def replace_section(version: Version, heading: str, text: str, uri: str | None = None) -> None:
    """Make `text` the section under `heading` of the description of `version`, in its place or at the end.

    Other sections stay. Raises TrackingError.
    """
    client = connect(uri)
    title = f"## {heading}"
    with reported(f"the description of {version.uri} cannot be written", "correct that"):
        number = str(version.version)
        before = client.get_model_version(version.name, number).description or ""
        kept = re.split(rf"^{re.escape(title)}[ \t]*$", before, maxsplit=1, flags=re.MULTILINE)
        behind = re.search(r"^#{1,2} ", kept[1], re.MULTILINE) if len(kept) > 1 else None
        after = kept[1][behind.start() :] if behind else ""
        parts = [kept[0].rstrip(), title, redact(text), after.rstrip()]
        client.update_model_version(version.name, number, "\n\n".join(filter(None, parts)))


def experiment_of(version: Version, uri: str | None = None) -> str | None:
    """Return the name of the experiment that `version` was registered from; None if it is gone."""
    client = connect(uri)
    try:
        experiment = client.get_experiment(client.get_run(version.run_id).info.experiment_id)
    except MlflowException:
        return None
    return str(experiment.name) if experiment.lifecycle_stage == "active" else None


def clean_name(name: str) -> str:
    """Return `name` as MLflow takes it for a metric or a tag: with `-` in place of other characters."""
    return _NOT_IN_NAMES.sub("-", name).strip("/ ")


def _dataset_name(name: str) -> str:
    return redact(name)[:MAX_DATASET_NAME_SIZE]


def _model_id(client: MlflowClient, version: Version) -> str | None:
    """Return the id of the logged model; a version that was registered by other means may have none.

    SQL stores do not keep it in the version. It is part of the source: `models:/ID`, or a place below `models/ID`.
    """
    registered = client.get_model_version(version.name, str(version.version))
    in_source = _MODEL_ID.search(registered.source or "")
    return registered.model_id or (in_source[1] if in_source else None)
