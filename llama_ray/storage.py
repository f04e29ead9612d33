"""The directory that a run's checkpoints go to: a local or shared path, or a URI such as `s3://bucket/runs`."""

from __future__ import annotations

import uuid
from pathlib import Path

from pyarrow import fs

_COMPLETE = "training.json"


class StorageError(ValueError):
    """A place that cannot be written to, or that does not hold what was asked for."""


def check_writable(location: str) -> None:
    """Write and delete a small file in `location`, made where it is missing. Raises StorageError."""
    try:
        filesystem, path = open_storage(location)
        filesystem.create_dir(path, recursive=True)
        probe = f"{path}/.write-test-{uuid.uuid4().hex}"
        with filesystem.open_output_stream(probe) as stream:
            stream.write(b"x")
        filesystem.delete_file(probe)
    except (OSError, ValueError) as e:
        reason = str(e).splitlines()[0]
        raise StorageError(
            f"output_dir {location} cannot be written ({reason}); give another --output_dir"
        ) from e


def latest_run(location: str) -> str:
    """The name of the run in `location` that saved a checkpoint last. Raises StorageError where there is none."""
    runs = {
        name: last for name in _directories(location) if (last := latest_checkpoint(f"{location}/{name}"))
    }
    if not runs:
        raise StorageError(
            f"output_dir {location} holds no run to resume; check --output_dir, or leave out --resume"
        )
    return max(runs, key=lambda name: _modified(f"{runs[name]}/{_COMPLETE}"))


def latest_checkpoint(run: str) -> str | None:
    """The newest complete checkpoint below the run directory `run`; None where it has none."""
    filesystem, path = open_storage(run)
    for name in sorted(_directories(run), reverse=True):
        marker = filesystem.get_file_info(f"{path}/{name}/{_COMPLETE}")
        if name.startswith("step_") and marker.type == fs.FileType.File:
            return f"{run}/{name}"
    return None


def read_text(file: str) -> str | None:
    """The content of `file`, None where it does not exist."""
    filesystem, path = open_storage(file)
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return None
    with filesystem.open_input_stream(path) as stream:
        return str(stream.read().decode())


def write_text(file: str, content: str) -> None:
    """Write `file`, with the directories above it."""
    filesystem, path = open_storage(file)
    filesystem.create_dir(str(Path(path).parent), recursive=True)
    with filesystem.open_output_stream(path) as stream:
        stream.write(content.encode())


def open_storage(location: str) -> tuple[fs.FileSystem, str]:
    """(filesystem, path on it) of an absolute path or a URI. Raises ValueError for neither."""
    return fs.FileSystem.from_uri(location)  # type: ignore[no-any-return]


def _directories(location: str) -> list[str]:
    filesystem, path = open_storage(location)
    found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return [info.base_name for info in found if info.type == fs.FileType.Directory]


def _modified(file: str) -> float:
    filesystem, path = open_storage(file)
    return float(filesystem.get_file_info(path).mtime_ns or 0)
