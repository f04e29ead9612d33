"""Download the weights of a registered version to this machine, once, and whole."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.models import Model
from mlflow.utils.file_utils import get_local_path_or_none

from llama_ray.tracking.cache import CachedVersion
from llama_ray.tracking.errors import TrackingError, reported
from llama_ray.tracking.lock import locked
from llama_ray.tracking.manifest import changed_content, unreadable_weights
from llama_ray.tracking.package import CHECKPOINT_PATH, FILES_KEY

_ATTEMPTS = 2
"""What arrives damaged is fetched once more: if it is damaged again, so is what is stored."""


def fetch(client: MlflowClient, name: str, version: int, cache_dir: Path | None = None) -> Path:
    """Return the local Hugging Face directory of a version that exists; see `registry.download`."""
    uri = str(client.tracking_uri)
    with reported(f"models:/{name}/{version} cannot be looked up at {uri}", "correct MLFLOW_TRACKING_URI"):
        location = client.get_model_version_download_uri(name, str(version)).rstrip("/")
    entry = CachedVersion.of(name, version, uri, cache_dir)
    # MLflow unquotes a path, too, where it stores artifacts.
    if local := get_local_path_or_none(f"{location}/{CHECKPOINT_PATH}"):  # type: ignore[no-untyped-call]
        return _local(Path(local), entry)
    target = entry.directory_for(location)
    if not entry.is_whole(target):
        with reported(f"{_ref(entry)} cannot be kept in {entry.folder}", "make room or correct that"):
            entry.folder.mkdir(parents=True, exist_ok=True)
            with locked(entry.folder / f".{target.name}.lock"):
                if not entry.is_whole(target):
                    _download(_Source(location, uri, entry), target)
    entry.note(target)
    return target


@dataclass(frozen=True)
class _Source:
    """Where the MLflow model `entry` is stored; `uri` leads to the server that may pass it on."""

    location: str
    uri: str
    entry: CachedVersion

    def get(self, path: str, folder: Path) -> Path:
        """Download the file or directory `path` of the model into `folder`; return where it is."""
        artifact = f"{self.location}/{path}"
        with reported(f"{_ref(self.entry)} cannot be downloaded from {artifact}", "try again later"):
            return Path(
                mlflow.artifacts.download_artifacts(
                    artifact_uri=artifact, dst_path=str(folder), tracking_uri=self.uri
                )
            )


def _local(directory: Path, entry: CachedVersion) -> Path:
    if not directory.is_dir():
        if directory.parent.parent.is_dir():
            raise _not_ours(entry)
        raise TrackingError(
            f"{_ref(entry)} is stored at {directory}, which does not exist on this machine; "
            "share that folder, or use an MLflow server (MLFLOW_TRACKING_URI=http://HOST:PORT)"
        )
    # Its owner may change other files.
    if damage := unreadable_weights(directory):
        raise _damaged(entry, damage)
    entry.note(directory)
    return directory


def _download(source: _Source, target: Path) -> None:
    """Replace the directory `target` by the checkpoint of `source`, once it has arrived whole."""
    partial = target.with_name(f".{target.name}.partial")
    damage: str | None = None
    try:
        for _ in range(_ATTEMPTS):
            # A killed process may have left it.
            shutil.rmtree(partial, ignore_errors=True)
            files = source.get(CHECKPOINT_PATH, partial)
            if not (files / "config.json").is_file():
                raise _not_ours(source.entry)
            damage = _damage(files, source.get("MLmodel", partial))
            if damage is None:
                shutil.rmtree(target, ignore_errors=True)
                files.rename(target)
                return
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    raise _damaged(source.entry, damage or "")


def _damage(files: Path, model: Path) -> str | None:
    """Return what is wrong with files that arrived; `model` is MLflow's description, which has their checksums."""
    notes = (Model.load(str(model)).metadata or {}).get(FILES_KEY, {})
    return changed_content(files, notes) or unreadable_weights(files)


def _ref(entry: CachedVersion) -> str:
    return f"models:/{entry.name}/{entry.version}"


def _damaged(entry: CachedVersion, damage: str) -> TrackingError:
    return TrackingError(f"{_ref(entry)} is damaged ({damage}); register it again, or serve another version")


def _not_ours(entry: CachedVersion) -> TrackingError:
    return TrackingError(
        f"{_ref(entry)} has no {CHECKPOINT_PATH}; give a version that jobs/train.py registered"
    )
