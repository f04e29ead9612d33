"""Files of a checkpoint between a local directory and its place on a mounted path or in an object store."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llama_ray.storage import atomic, run_directory, store
from llama_ray.training.checkpointing.progress import FileRecord


def make_empty(directory: str) -> None:
    """Create `directory`, without the files that a crashed run left there: they would become part of a checkpoint."""
    run_directory.remove_checkpoint(directory)
    store.make_directory(directory)


@contextlib.contextmanager
def staging(directory: str) -> Iterator[Path]:
    """Yield where to write files for `directory`: itself on a mounted path, else a temporary one to upload from."""
    if store.is_local(directory):
        yield Path(store.open_storage(directory)[1])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)


def commit(file: Path, target: str, sha256: str | None = None) -> FileRecord:
    """Make `file`, which was written to the staging directory, durable at `target`; return its record.

    `sha256` is its digest; without it the file is read again.
    """
    record: FileRecord = {"bytes": file.stat().st_size, "sha256": sha256 or store.sha256(str(file))}
    if store.is_local(target):
        atomic.sync(file)
    else:
        store.upload(file, target)
    return record


@contextlib.contextmanager
def local_description(checkpoint: str) -> Iterator[Path]:
    """Yield a directory with the JSON files of `checkpoint`, all that the checks of a resume read."""
    if store.is_local(checkpoint):
        yield Path(store.open_storage(checkpoint)[1])
        return
    with tempfile.TemporaryDirectory() as local:
        for name in store.list_files(checkpoint):
            if name.endswith(".json"):
                Path(local, name).write_text(store.read_text(store.join(checkpoint, name)) or "")
        yield Path(local)


@contextlib.contextmanager
def local_copy(checkpoint: str) -> Iterator[Path]:
    """Yield a directory with the files of `checkpoint`: itself on a mounted path, else a temporary copy."""
    if store.is_local(checkpoint):
        yield Path(store.open_storage(checkpoint)[1])
        return
    with tempfile.TemporaryDirectory() as local:
        store.download(checkpoint, Path(local))
        yield Path(local)
