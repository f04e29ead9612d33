"""One MLflow run for one training run; no secret of a URI is stored in it.

The driver creates the run; the process that trains attaches to it by `run_id` and `uri`. All calls use MlflowClient:
there is no active run and no other global state, so nothing can end the run by accident.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT
from mlflow.utils.validation import (
    MAX_DATASET_NAME_SIZE,
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
)

from llama_ray.storage.paths import is_uri
from llama_ray.tracking.errors import TrackingError, reported
from llama_ray.tracking.figures import loss_curve
from llama_ray.tracking.uri import artifact_location, connect, tracking_uri, without_user
from llama_ray.utils.errors import first_line
from llama_ray.utils.redact import redact

_DIGEST_CHARACTERS = 12
"""Of a fingerprint, as the UI shows it beside the name of a data set."""

Status = Literal["FINISHED", "FAILED", "KILLED"]

Point = tuple[int, int, dict[str, float]]
"""(step, time in ms since 1970, metrics)."""

_log = logging.getLogger(__name__)


class Run:
    """An MLflow run. `Run.create` starts one, `Run.attach` finds one."""

    def __init__(self, client: MlflowClient, run_id: str, experiment_id: str) -> None:
        self._client = client
        self.run_id = run_id
        self.experiment_id = experiment_id

    @classmethod
    def create(
        cls,
        *,
        experiment: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        description: str,
        uri: str | None = None,
    ) -> Run:
        """Start a run, and create its experiment if it is new. Nested `params` become `outer.inner`.

        `description` is Markdown for the run's page. A parameter above MLflow's limit of length is cut; `log_config`
        keeps it whole. Raises TrackingError, within seconds, if no server answers at `uri`.
        """
        uri = uri or tracking_uri()
        client = connect(uri)
        with reported(
            f"run {name!r} cannot be created at {uri}", "correct MLFLOW_TRACKING_URI or --experiment"
        ):
            experiment_id = _experiment(client, experiment, uri)
            created = client.create_run(
                experiment_id,
                run_name=name,
                tags=_redacted({**tags, "mlflow.note.content": description}),
            )
            run = cls(client, created.info.run_id, experiment_id)
            entries = [Param(key, _clip(redact(str(value)))) for key, value in _flatten(params)]
            for start in range(0, len(entries), MAX_PARAMS_TAGS_PER_BATCH):
                client.log_batch(run.run_id, params=entries[start : start + MAX_PARAMS_TAGS_PER_BATCH])
        return run

    @classmethod
    def attach(cls, run_id: str, uri: str | None = None) -> Run:
        """Return the run with this id. Raises TrackingError if it does not exist, was deleted, or cannot be read.

        Unlike `create`, this retries an unreachable server for minutes, as MLflow does.
        """
        client = connect(uri, patient=True)
        with reported(f"no run {run_id} at {client.tracking_uri}", "correct MLFLOW_TRACKING_URI"):
            info = client.get_run(run_id).info
        if info.lifecycle_stage == "deleted":
            raise TrackingError(
                f"run {run_id} was deleted; bring it back with: mlflow runs restore --run-id {run_id}"
            )
        return cls(client, run_id, info.experiment_id)

    @property
    def uri(self) -> str:
        """The tracking URI, the same in every process; that of a database may hold a password."""
        return str(self._client.tracking_uri)

    @property
    def url(self) -> str | None:
        """The run's page in the UI of the tracking server; None without a server.

        The UI of MLflow 3.17 opens every experiment on GenAI traces, whatever its tags say, unless the address asks
        for model training.
        """
        if not self.uri.startswith("http"):
            return None
        page = f"{without_user(self.uri).rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return f"{page}?workflowType=machine_learning"

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log all `metrics` of one step in one request. Infinities become NaN, which is a gap in the chart.

        SQL stores would turn an infinity into 1.8e308, which flattens the rest of the chart.
        """
        self.log_points([(step, int(time.time() * 1000), dict(metrics))])

    def log_points(self, points: Iterable[Point]) -> None:
        """Log the metrics of several steps in as few requests as MLflow allows."""
        entries = [
            Metric(name, _finite(value), at, step)
            for step, at, metrics in points
            for name, value in metrics.items()
        ]
        for start in range(0, len(entries), MAX_METRICS_PER_BATCH):
            self._client.log_batch(self.run_id, metrics=entries[start : start + MAX_METRICS_PER_BATCH])

    def last_steps(self) -> dict[str, int]:
        """Return the largest step of each metric. A resumed run continues after it."""
        # `data.metrics` has no steps, and the public history returns every point. MLflow reads this list itself.
        points: list[Metric] = self._client.get_run(self.run_id).data._metric_objs
        return {point.key: int(point.step) for point in points}

    def history(self, metric: str) -> list[Metric]:
        """Return the latest point of each step of `metric` (`.step`, `.value`, `.timestamp` in ms), by step."""
        points = self._client.get_metric_history(self.run_id, metric)
        by_step = {point.step: point for point in sorted(points, key=lambda p: (p.step, p.timestamp))}
        return list(by_step.values())

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Store the configuration as the artifact `config.yaml`, in the given order.

        It is the first artifact of a run. Raises TrackingError if the experiment's artifacts cannot be stored.
        """
        location = self._client.get_run(self.run_id).info.artifact_uri
        with reported(
            f"artifacts cannot be stored at {location}", "correct that storage, or give another --experiment"
        ):
            self.log_text(yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True), "config.yaml")

    def log_dataset(self, name: str, *, fingerprint: str, source: str, sizes: Mapping[str, int]) -> None:
        """Link the training data to the run: the UI shows it on the run's page and in the list of runs.

        Raises TrackingError.
        """
        dataset = Dataset(
            redact(name)[:MAX_DATASET_NAME_SIZE],
            fingerprint[:_DIGEST_CHARACTERS],
            source.partition("://")[0] if is_uri(source) else "local",
            json.dumps({"uri": redact(source)}),
            profile=json.dumps(dict(sizes)),
        )
        context = InputTag(MLFLOW_DATASET_CONTEXT, "training")
        with reported(f"run {self.run_id} cannot be written", "correct that"):
            self._client.log_inputs(self.run_id, [DatasetInput(dataset, [context])])

    def log_text(self, text: str, path: str) -> None:
        """Store `text` as the artifact `path`; replaces an existing one."""
        self._client.log_text(self.run_id, text, path)

    def log_file(self, file: Path, directory: str) -> None:
        """Store a local file as an artifact of the same name in `directory`."""
        self._client.log_artifact(self.run_id, str(file), directory)

    def log_figure(self, figure: Figure, path: str) -> None:
        """Store a Matplotlib figure as the artifact `path`, whose suffix gives the format."""
        self._client.log_figure(self.run_id, figure, path)

    def log_loss_curve(self, path: str = "loss_curve.png") -> None:
        """Plot `loss/train` and `loss/validation` against `progress/tokens`, or against steps if tokens are missing.

        Reads the points from MLflow, so a resumed run shows its whole history.
        """
        tokens = {point.step: point.value for point in self.history("progress/tokens")}
        train, validation = self.history("loss/train"), self.history("loss/validation")
        over_tokens = bool(tokens) and all(point.step in tokens for point in [*train, *validation])
        x = tokens if over_tokens else {point.step: point.step for point in [*train, *validation]}
        figure = loss_curve(
            {x[point.step]: point.value for point in train},
            {x[point.step]: point.value for point in validation},
            x_label="tokens" if over_tokens else "steps",
        )
        self.log_figure(figure, path)

    def log_samples(self, samples: Sequence[tuple[str, str]], step: int) -> None:
        """Store (prompt, continuation) pairs of a validation as the Markdown artifact `samples/step_000100.md`."""
        parts = [f"# Samples at step {step}"]
        for prompt, continuation in samples:
            ticks = re.findall("`+", prompt + continuation)
            fence = "`" * max(3, 1 + max(map(len, ticks), default=0))
            parts.append(f"**Prompt**\n{fence}text\n{prompt}\n{fence}")
            parts.append(f"**Continuation**\n{fence}text\n{continuation}\n{fence}")
        self.log_text("\n\n".join(parts) + "\n", f"samples/step_{step:06d}.md")

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        for key, value in _redacted(tags).items():
            self._client.set_tag(self.run_id, key, value)

    @contextmanager
    def system_metrics(self, interval_s: float = 10.0) -> Iterator[None]:
        """Log `system/*` metrics of this machine (CPU, memory, disk, network, GPUs) from a thread, until the exit.

        After a restart their steps continue. MLflow's thread stops when the run is not RUNNING, so call `reopen` first
        on a run that had ended.
        """
        monitor: Any = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
            self.run_id, sampling_interval=interval_s, resume_logging=True, tracking_uri=self.uri
        )
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    def reopen(self) -> None:
        """Mark a run that had ended as RUNNING, before it is resumed. Raises TrackingError."""
        with reported(f"run {self.run_id} cannot be continued", "correct that, or start a new run"):
            self._client.update_run(self.run_id, status="RUNNING")

    def finish(self, status: Status) -> None:
        """End the run with this status; warn if MLflow does not take it, because what was trained is kept anyway."""
        try:
            self._client.set_terminated(self.run_id, status)
        except Exception as error:
            _log.warning(
                "MLflow does not show that run %s is %s (%s)", self.run_id, status, first_line(error)
            )


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    """Return the id of the experiment, created with our artifact location if it is new."""
    found = client.get_experiment_by_name(name)
    if found is None:
        # Older UIs open an experiment with this tag on its runs instead of GenAI traces; for 3.17 see `Run.url`.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location(uri), tags=tags))
        except MlflowException:
            # Another process may have created it meanwhile.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    experiment: Experiment = found
    if experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"experiment {name!r} was deleted; bring it back with: mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}, or take another name"
        )
    return str(experiment.experiment_id)


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _clip(value: str) -> str:
    return value if len(value) <= MAX_PARAM_VAL_LENGTH else value[: MAX_PARAM_VAL_LENGTH - 1] + "…"


def _redacted(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: redact(value) for key, value in tags.items()}


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else math.nan


def _plain(value: Any) -> Any:
    """Convert `value` to types that YAML has: mappings, lists, strings, numbers, booleans and null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else redact(str(value))
