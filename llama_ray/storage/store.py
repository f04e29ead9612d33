"""Files at a location: a local or shared path, or a URI such as `s3://bucket/runs`."""

from __future__ import annotations

import hashlib
import itertools
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pyarrow import fs

from llama_ray.storage import atomic
from llama_ray.utils.errors import first_line

_CHUNK = 1 << 22


_CHUNKS_IN_FLIGHT = 16


_GCS_RETRY_S = 1


class StorageError(ValueError):
    """A place that cannot be written to, or that does not hold what was asked for."""


def join(location: str, name: str) -> str:
    """`name` in `location`. What a URI says after a question mark, such as the address of a server, stays last."""
    if "://" not in location:
        return f"{location}/{name}"
    place, question, options = location.partition("?")
    return f"{place.rstrip('/')}/{name}{question}{options}"


def name_of(location: str) -> str:
    """The last part of a path or URI, as `join` put it there."""
    return location.partition("?")[0].rpartition("/")[2] if "://" in location else Path(location).name


def check_writable(location: str) -> None:
    """Write and delete a small file in `location`, made where it is missing. Raises StorageError."""
    try:
        filesystem, path = open_storage(_impatient(location))
        filesystem.create_dir(path, recursive=True)
        probe = f"{path}/.write-test-{uuid.uuid4().hex}"
        with filesystem.open_output_stream(probe) as stream:
            stream.write(b"x")
        filesystem.delete_file(probe)
    except (OSError, ValueError) as e:
        reason = first_line(e)
        raise StorageError(
            f"output_dir {location} cannot be written ({reason}); give another --output_dir"
        ) from e


def sha256(file: str) -> str:
    """Hex digest of a file's content."""
    filesystem, path = open_storage(file)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def is_local(location: str) -> bool:
    """Whether `location` is a directory of this machine or one mounted on it, not an object store."""
    return isinstance(open_storage(location)[0], fs.LocalFileSystem)


def upload(source: Path, target: str) -> None:
    """Copy the local file `source` to `target`."""
    filesystem, path = open_storage(target)
    with source.open("rb") as file, filesystem.open_output_stream(path) as stream:
        # An S3 stream sends parts in the background and sets no limit to those that wait, so a file that is read
        # faster than the network takes it would be in memory as a whole.
        for n in itertools.count(1):
            chunk = file.read(_CHUNK)
            if not chunk:
                break
            stream.write(chunk)
            if n % _CHUNKS_IN_FLIGHT == 0:
                stream.flush()


def download(source: str, target: Path) -> None:
    """Copy the directory `source` to the local directory `target`."""
    filesystem, path = open_storage(source)
    fs.copy_files(
        path, str(target), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem()
    )


def make_directory(location: str) -> None:
    """Create `location` with what is above it; fine where it exists."""
    filesystem, path = open_storage(location)
    filesystem.create_dir(path, recursive=True)


def read_text(file: str) -> str | None:
    """The content of `file`, None where it does not exist."""
    filesystem, path = open_storage(file)
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return None
    with filesystem.open_input_stream(path) as stream:
        return str(stream.read().decode())


def write_text(file: str, content: str) -> None:
    """Write `file`, with the directories above it, so that a reader sees the old content or the new."""
    with replacing(file) as stream:
        stream.write(content.encode())


@contextmanager
def replacing(file: str) -> Iterator[BinaryIO]:
    """A binary stream into `file`, which a reader sees as it was until the stream is closed without an error.

    Makes the directories above it. On an object store an error in between may leave a cut object: write there what
    is checked before it is used.
    """
    filesystem, path = open_storage(file)
    filesystem.create_dir(str(Path(path).parent), recursive=True)
    if not isinstance(filesystem, fs.LocalFileSystem):
        # an object appears when its upload is complete; by default pyarrow compresses what is called .gz
        with filesystem.open_output_stream(path, compression=None) as stream:
            yield stream
        return
    with atomic.replacing(Path(path)) as local_stream:
        yield local_stream


def list_files(location: str) -> list[str]:
    """The files directly in the directory `location`, sorted; none where it does not exist."""
    filesystem, path = open_storage(location)
    found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in found if info.type == fs.FileType.File)


def delete(file: str) -> None:
    """Delete `file`; fine where there is none."""
    filesystem, path = open_storage(file)
    if filesystem.get_file_info(path).type == fs.FileType.File:
        filesystem.delete_file(path)


def open_storage(location: str) -> tuple[fs.FileSystem, str]:
    """(filesystem, path on it) of an absolute path or a URI. Raises ValueError for neither."""
    return fs.FileSystem.from_uri(location)  # type: ignore[no-any-return]


def _impatient(location: str) -> str:
    """Google's client retries for a quarter of an hour, also when there are no credentials, unless it is told."""
    if not location.startswith(("gs://", "gcs://")) or "retry_limit_seconds=" in location:
        return location
    return f"{location}{'&' if '?' in location else '?'}retry_limit_seconds={_GCS_RETRY_S}"


def list_directories(location: str) -> list[str]:
    """The directories directly in `location`, unsorted; none where it does not exist."""
    filesystem, path = open_storage(location)
    found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return [info.base_name for info in found if info.type == fs.FileType.Directory]
