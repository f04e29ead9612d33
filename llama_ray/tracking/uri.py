"""The tracking URI: where it comes from, and whether MLflow answers there."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from mlflow import MlflowClient

from llama_ray.storage.paths import workspace
from llama_ray.tracking.lock import locked

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_REACH_TIMEOUT_S = 10.0


class TrackingError(ValueError):
    """A tracking server, run, model or reference that does not exist or cannot be used; one line."""


def tracking_uri() -> str:
    """Return MLFLOW_TRACKING_URI if it is set, else the URI of an SQLite file `mlflow.db` in the workspace.

    The path of an SQLite URI is made absolute, so that it means the same file in every process.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path = sqlite_path(uri)
    return uri if path is None else f"sqlite:///{path}"


def sqlite_path(uri: str) -> Path | None:
    """Return the absolute path of the database file of an SQLite URI; None for any other URI."""
    parts = urlsplit(uri)
    if parts.scheme.partition("+")[0] != "sqlite":
        return None
    return workspace() / parts.path[1:]


def artifact_location(uri: str) -> str | None:
    """Return the file URI of a new experiment's artifacts; None if a server decides that itself."""
    if urlsplit(uri).scheme.partition("+")[0] not in _DATABASES:
        return None
    database = sqlite_path(uri)
    return ((database.parent if database else workspace()) / "mlartifacts").as_uri()


def connect(uri: str | None = None, *, patient: bool = False) -> MlflowClient:
    """Return a client for `uri` (default: `tracking_uri()`) after a quick check that a server answers there.

    MLflow retries an unreachable server for minutes before it raises; with `patient` there is no check, so the first
    call waits that long. Raises TrackingError.
    """
    uri = uri or tracking_uri()
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if database := sqlite_path(uri):
        return _open_database(uri, database)
    if scheme in ("http", "https"):
        if not patient:
            _check_server(uri)
    elif scheme not in _DATABASES and not uri.startswith("databricks"):
        raise TrackingError(
            f"MLFLOW_TRACKING_URI={uri} is not a tracking URI; give http://HOST:PORT of a server, or sqlite:////absolute/path/mlflow.db"
        )
    return MlflowClient(tracking_uri=uri)


def _open_database(uri: str, database: Path) -> MlflowClient:
    folder = database.parent
    if folder == workspace():
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise TrackingError(
            f"{folder} is not a writable directory, so {database.name} cannot be opened; correct MLFLOW_TRACKING_URI"
        )
    # The client creates the schema, and two processes that do so at once break each other's migration.
    with locked(folder / f"{database.name}.lock"):
        return MlflowClient(tracking_uri=uri)


def _check_server(uri: str) -> None:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_REACH_TIMEOUT_S):
            return
    except urllib.error.HTTPError as error:
        if error.code < 500:
            # A server answers; MLflow's client reports better why it refuses.
            return
        reason = f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))
    raise TrackingError(
        f"no MLflow server answers at {uri} ({reason}); start one there, "
        "or correct or unset MLFLOW_TRACKING_URI"
    )
