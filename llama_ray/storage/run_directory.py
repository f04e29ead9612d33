"""The directory of a run: its checkpoints, and which of them are whole.

A checkpoint is a directory `step_*` whose last written file, the marker, names every other file with its length and
SHA-256. A directory without a marker is not a checkpoint; one with a file that differs from the marker is damaged.
Both are passed over.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from typing import Any

from pyarrow import fs

from llama_ray.storage import store
from llama_ray.utils.errors import first_line

MARKER = "training.json"


def latest_run(location: str) -> str:
    """The name of the run in `location` that saved a checkpoint last. Raises StorageError where there is none."""
    runs = {
        name: last
        for name in store.list_directories(location)
        if (last := latest_checkpoint(store.join(location, name)))
    }
    if not runs:
        raise store.StorageError(
            f"output_dir {location} holds no run to resume; check --output_dir, or leave out --resume"
        )
    return max(runs, key=lambda name: _modified(store.join(runs[name], MARKER)))


def latest_checkpoint(run: str) -> str | None:
    """The newest checkpoint below the run directory `run` whose files are all there in full; None without one."""
    return next((c for c in list_checkpoints(run) if not missing_or_cut(c)), None)


def list_checkpoints(run: str) -> list[str]:
    """Directories below `run` that have a marker, newest first, looked into no further."""
    filesystem, path = store.open_storage(run)
    names = sorted((n for n in store.list_directories(run) if n.startswith("step_")), reverse=True)
    return [
        store.join(run, name)
        for name in names
        if filesystem.get_file_info(f"{path}/{name}/{MARKER}").type == fs.FileType.File
    ]


def read_marker(checkpoint: str) -> dict[str, Any] | None:
    """What the marker of `checkpoint` says; None where there is none, or it is no JSON object."""
    try:
        content = json.loads(store.read_text(store.join(checkpoint, MARKER)) or "")
    except ValueError:
        return None
    return content if isinstance(content, dict) and isinstance(content.get("files"), dict) else None


def missing_or_cut(checkpoint: str) -> str | None:
    """What is wrong with `checkpoint` as far as names and lengths of files tell; None for nothing. Warns of it."""
    marker = read_marker(checkpoint)
    if marker is None:
        return _damaged(checkpoint, f"{MARKER} cannot be read")
    filesystem, path = store.open_storage(checkpoint)
    for file, record in marker["files"].items():
        size = filesystem.get_file_info(f"{path}/{file}").size
        if size != record["bytes"]:
            return _damaged(checkpoint, f"{file} has {size or 0} bytes, {record['bytes']} were written")
    return None


def altered(checkpoint: str, files: Iterable[str]) -> str | None:
    """The first of `files` whose content is no longer what the marker of `checkpoint` recorded, as a sentence."""
    marker = read_marker(checkpoint) or {"files": {}}
    for file in files:
        try:
            found = store.sha256(store.join(checkpoint, file))
        except OSError as e:
            return _damaged(checkpoint, f"{file} cannot be read ({first_line(e)})")
        if found != marker["files"][file]["sha256"]:
            return _damaged(checkpoint, f"the content of {file} is not what was written")
    return None


def remove_checkpoint(checkpoint: str) -> None:
    """Delete a checkpoint, its marker first: what a crash leaves of it is never taken for a whole one."""
    filesystem, path = store.open_storage(checkpoint)
    if filesystem.get_file_info(f"{path}/{MARKER}").type == fs.FileType.File:
        filesystem.delete_file(f"{path}/{MARKER}")
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        filesystem.delete_dir(path)


def _damaged(checkpoint: str, reason: str) -> str:
    warnings.warn(f"{checkpoint} is damaged and passed over: {reason}", stacklevel=3)
    return reason


def _modified(file: str) -> float:
    filesystem, path = store.open_storage(file)
    return float(filesystem.get_file_info(path).mtime_ns or 0)
