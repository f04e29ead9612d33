"""The tracking URI: where it comes from, and whether MLflow answers there."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

import sqlalchemy
from mlflow import MlflowClient
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from llama_ray.storage.paths import workspace
from llama_ray.tracking.errors import TrackingError, reported
from llama_ray.tracking.lock import locked

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_FILES = ("", "file")
_REACH_TIMEOUT_S = 10.0
_URIS = "give http://HOST:PORT of a server, or sqlite:////absolute/path/mlflow.db"


def tracking_uri() -> str:
    """Return MLFLOW_TRACKING_URI if it is set, else the URI of an SQLite file `mlflow.db` in the workspace.

    The path of an SQLite URI is made absolute, so that it means the same file in every process. A password in the URI
    stays there for `connect` in another process; `redact` hides it.
    """
    return _absolute(os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")


def sqlite_path(uri: str) -> Path | None:
    """Return the absolute path of the database file of an SQLite URI; None for any other URI. Raises TrackingError."""
    if _scheme(uri) != "sqlite":
        return None
    with reported(f"MLFLOW_TRACKING_URI={uri} is not a tracking URI", _URIS):
        path = sqlalchemy.make_url(uri).database
    if path in (None, "", ":memory:"):
        raise TrackingError(f"MLFLOW_TRACKING_URI={uri} names no file, which all processes share; {_URIS}")
    return workspace() / str(path)


def sqlite_uri(database: Path) -> str:
    """Return the URI of the database file with this absolute path."""
    quoted = str(database).replace("%", "%25").replace("?", "%3F")
    # For `sqlite:` MLflow makes the folder of the path, but without unquoting its name.
    scheme = "sqlite" if quoted == str(database) else "sqlite+pysqlite"
    return f"{scheme}:///{quoted}"


def artifact_location(uri: str) -> str | None:
    """Return the file URI of a new experiment's artifacts; None if a server decides that itself."""
    if _scheme(uri) not in _DATABASES:
        return None
    database = sqlite_path(uri)
    return ((database.parent if database else workspace()) / "mlartifacts").as_uri()


def connect(uri: str | None = None, *, patient: bool = False) -> MlflowClient:
    """Return a client for `uri` (default: `tracking_uri()`) after a quick check that a server answers there.

    MLflow retries an unreachable server for minutes before it raises; with `patient` there is no check, so the first
    call waits that long. A password in the URI of a server moves to MLFLOW_TRACKING_USERNAME and _PASSWORD, from which
    MLflow's client takes it without showing it. Raises TrackingError.
    """
    uri = _absolute(uri or tracking_uri())
    scheme = _scheme(uri)
    if database := sqlite_path(uri):
        return _open_database(uri, database)
    if scheme in _FILES:
        raise TrackingError(f"MLFLOW_TRACKING_URI={uri} is not a tracking URI; {_URIS}")
    if scheme in ("http", "https"):
        uri = _without_password(uri)
    if not patient:
        check_answers(uri)
    # Databricks and the schemes of plug-ins are for MLflow to know.
    with reported(f"MLFLOW_TRACKING_URI={uri} is not a tracking URI that MLflow can use here", _URIS):
        return MlflowClient(tracking_uri=uri)


def check_answers(uri: str) -> None:
    """Raise TrackingError within seconds if no server or database answers at `uri`, the `tracking_uri` of a client."""
    scheme = _scheme(uri)
    if scheme in ("http", "https"):
        _check_server(uri)
    elif scheme in _DATABASES and scheme != "sqlite":
        _check_database(uri)


def identity(uri: str | None = None) -> str:
    """Return what tells the registry at `uri` (default: `tracking_uri()`) from others, without user and password."""
    uri = _absolute(uri or tracking_uri())
    return uri if sqlite_path(uri) else without_user(uri)


def without_user(uri: str) -> str:
    """Return the URI of a server without user and password, for a browser."""
    parts = _split(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _absolute(uri: str) -> str:
    database = sqlite_path(uri)
    if database is None:
        return uri
    _, question, options = uri.partition("?")
    return f"{sqlite_uri(database)}{question}{options}"


def _scheme(uri: str) -> str:
    # `databricks` alone is a tracking URI, too.
    return uri if uri.startswith("databricks") else _split(uri).scheme.partition("+")[0]


def _split(uri: str) -> SplitResult:
    with reported(f"MLFLOW_TRACKING_URI={uri} is not a tracking URI", _URIS):
        return urlsplit(uri)


def _without_password(uri: str) -> str:
    """Move user and password from the URI to the environment.

    MLflow's messages, links and logs show the URI that it has. A user without a password has no effect there.
    """
    parts = _split(uri)
    if parts.password and not parts.username:
        # The variables have an effect together only, and a link that MLflow prints at the end would show it.
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        return uri
    if parts.password:
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
    return without_user(uri)


def _open_database(uri: str, database: Path) -> MlflowClient:
    folder = database.parent
    if folder == workspace():
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise TrackingError(
            f"{folder} is not a writable directory, so {database.name} cannot be opened; correct MLFLOW_TRACKING_URI"
        )
    # The client creates the schema, and two processes that do so at once break each other's migration.
    with (
        reported(f"{database} cannot be opened", "correct MLFLOW_TRACKING_URI"),
        locked(folder / f"{database.name}.lock"),
    ):
        return MlflowClient(tracking_uri=uri)


def _check_server(uri: str) -> None:
    """Ask the server as MLflow's client does: with its credentials, certificates and proxies."""
    with reported(
        f"no MLflow server answers at {uri}", "start one there, or correct or unset MLFLOW_TRACKING_URI"
    ):
        answer = http_request(  # type: ignore[no-untyped-call]
            get_default_host_creds(uri),  # type: ignore[no-untyped-call]
            "/health",
            "GET",
            max_retries=0,
            timeout=_REACH_TIMEOUT_S,
            raise_on_status=False,
        )
        # Below 500 a server answers; MLflow's client reports better why it refuses.
        if answer.status_code >= 500:
            raise ConnectionError(f"HTTP {answer.status_code}")


def _check_database(uri: str) -> None:
    with reported(f"no database answers at {uri}", "start it there, or correct or unset MLFLOW_TRACKING_URI"):
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
        with engine.connect():
            pass
