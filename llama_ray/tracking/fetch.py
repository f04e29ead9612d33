"""Download the weights of a registered version to this machine, once."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from llama_ray.tracking.lock import locked
from llama_ray.tracking.package import CHECKPOINT_PATH
from llama_ray.tracking.uri import TrackingError
from llama_ray.utils.errors import first_line

CACHE = Path("~/.cache/llama_ray/models")


def fetch(client: MlflowClient, name: str, version: int, cache_dir: Path | None = None) -> Path:
    """Return the local Hugging Face directory of a version that exists; see `registry.download`."""
    uri = str(client.tracking_uri)
    location = client.get_model_version_download_uri(name, str(version))
    artifact = f"{location.rstrip('/')}/{CHECKPOINT_PATH}"
    parts = urlsplit(artifact)
    if parts.scheme in ("", "file"):
        return _local(Path(url2pathname(parts.path)), name, version)
    # A new database starts again at version 1. The location contains a random id, so its key differs.
    key = hashlib.sha256("\n".join((uri, name, str(version), location)).encode()).hexdigest()[:12]
    folder = (cache_dir or CACHE).expanduser() / name
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{version}-{key}"
    if target.is_dir():
        return target
    with locked(folder / f".{target.name}.lock"):
        if target.is_dir():
            return target
        partial = folder / f".{target.name}.partial"
        # A killed process may have left it.
        shutil.rmtree(partial, ignore_errors=True)
        try:
            files = mlflow.artifacts.download_artifacts(
                artifact_uri=artifact, dst_path=str(partial), tracking_uri=uri
            )
        except (MlflowException, OSError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = first_line(error)
            raise TrackingError(
                f"models:/{name}/{version} cannot be downloaded from {artifact}: {reason}"
            ) from error
        if not (Path(files) / "config.json").is_file():
            shutil.rmtree(partial)
            raise _not_ours(name, version)
        Path(files).rename(target)
        shutil.rmtree(partial)
    return target


def _local(directory: Path, name: str, version: int) -> Path:
    if directory.is_dir():
        return directory
    if directory.parent.parent.is_dir():
        raise _not_ours(name, version)
    raise TrackingError(
        f"models:/{name}/{version} is stored at {directory}, which does not exist on this machine; "
        "share that folder, or use an MLflow server (MLFLOW_TRACKING_URI=http://HOST:PORT)"
    )


def _not_ours(name: str, version: int) -> TrackingError:
    return TrackingError(
        f"models:/{name}/{version} has no {CHECKPOINT_PATH}; give a version that jobs/train.py registered"
    )
