"""Download the weights of a registered version to this machine, once."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.utils.file_utils import get_local_path_or_none

from llama_ray.tracking.errors import TrackingError, reported
from llama_ray.tracking.lock import locked
from llama_ray.tracking.package import CHECKPOINT_PATH

CACHE = Path("~/.cache/llama_ray/models")


def fetch(client: MlflowClient, name: str, version: int, cache_dir: Path | None = None) -> Path:
    """Return the local Hugging Face directory of a version that exists; see `registry.download`."""
    uri = str(client.tracking_uri)
    with reported(f"models:/{name}/{version} cannot be looked up at {uri}", "correct MLFLOW_TRACKING_URI"):
        location = client.get_model_version_download_uri(name, str(version))
    artifact = f"{location.rstrip('/')}/{CHECKPOINT_PATH}"
    # MLflow unquotes a path, too, where it stores artifacts.
    if local := get_local_path_or_none(artifact):  # type: ignore[no-untyped-call]
        return _local(Path(local), name, version)
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
            with reported(
                f"models:/{name}/{version} cannot be downloaded from {artifact}", "try again later"
            ):
                files = mlflow.artifacts.download_artifacts(
                    artifact_uri=artifact, dst_path=str(partial), tracking_uri=uri
                )
        except TrackingError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
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
