"""Files at a location: a local or shared path, or a URI such as `s3://bucket/runs`."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote, unquote

from llama_ray.storage import atomic
from llama_ray.storage.paths import is_uri
from llama_ray.utils.errors import UserError

if TYPE_CHECKING:
    # pyarrow is imported at its first use, because models train and generate on machines that lack it.
    from pyarrow import fs

_CHUNK_BYTES = 1 << 22
_CHUNKS_IN_FLIGHT = 16
_GCS_RETRY_S = 1


class StorageError(UserError):
    """A location that cannot be used, or does not hold what was asked for."""


def open_storage(location: str) -> tuple[fs.FileSystem, str]:
    """Return (filesystem, path on it) of an absolute path or a URI. Raises ValueError for anything else."""
    from pyarrow import fs

    if is_uri(location) and "#" in location:
        # A URI ends there, so that this would be another directory.
        raise StorageError(f"{location} is a URI with '#'; write it as %23")
    return fs.FileSystem.from_uri(location)  # type: ignore[no-any-return]


def with_short_retries(location: str) -> str:
    """Limit the retries of Google's client: by default it tries for 15 minutes, even without credentials."""
    if not location.startswith(("gs://", "gcs://")) or "retry_limit_seconds=" in location:
        return location
    return f"{location}{'&' if '?' in location else '?'}retry_limit_seconds={_GCS_RETRY_S}"


def is_local(location: str) -> bool:
    """Whether `location` is on this machine or mounted on it, not in an object store."""
    return bool(open_storage(location)[0].type_name == "local")


def join(location: str, name: str) -> str:
    """Return the location of `name` in the directory `location`; the options of a URI, after '?', stay at its end."""
    if not is_uri(location):
        return f"{location}/{name}"
    path, question, options = location.partition("?")
    return f"{path.rstrip('/')}/{quote(name)}{question}{options}"


def beside(location: str, suffix: str) -> str:
    """Return the location whose name is that of `location` with `suffix` appended."""
    if not is_uri(location):
        return location + suffix
    path, question, options = location.partition("?")
    return f"{path}{quote(suffix)}{question}{options}"


def name_of(location: str) -> str:
    """Return the last component of a path or URI, which `join` appended."""
    if not is_uri(location):
        return Path(location).name
    return unquote(location.partition("?")[0].rpartition("/")[2])


def make_directory(location: str) -> None:
    """Create the directory `location` and its parents, unless it exists."""
    filesystem, path = open_storage(location)
    filesystem.create_dir(path, recursive=True)


def list_files(location: str) -> list[str]:
    """Return the names of the files directly in the directory `location`, sorted; none if it does not exist."""
    return _names(location, "File")


def list_directories(location: str) -> list[str]:
    """Return the names of the directories directly in `location`, sorted; none if it does not exist."""
    return _names(location, "Directory")


def read_text(file: str) -> str | None:
    """Return the content of `file`; None if it does not exist."""
    filesystem, path = open_storage(file)
    if not filesystem.get_file_info(path).is_file:
        return None
    with filesystem.open_input_stream(path) as stream:
        return str(stream.read().decode())


def write_text(file: str, content: str) -> None:
    """Write `file`, and create the directories above it; readers see the old content or the new."""
    with replacing(file) as stream:
        stream.write(content.encode())


@contextmanager
def replacing(file: str) -> Iterator[BinaryIO]:
    """Open a binary stream whose content replaces `file` when the block ends without an error.

    Creates the directories above it. Only a local file is safe from an error in the block: an object store may then
    hold a truncated object, so its content must be checked before it is used.
    """
    filesystem, path = open_storage(file)
    filesystem.create_dir(str(Path(path).parent), recursive=True)
    if filesystem.type_name == "local":
        with atomic.replacing(Path(path)) as local_stream:
            yield local_stream
    else:
        # An object appears when its upload is complete. By default pyarrow would compress a file named *.gz.
        with filesystem.open_output_stream(path, compression=None) as stream:
            yield stream


def delete(file: str) -> None:
    """Delete `file`, unless it does not exist."""
    filesystem, path = open_storage(file)
    if filesystem.get_file_info(path).is_file:
        filesystem.delete_file(path)


def modified_ns(file: str) -> int:
    """Return when `file` was written, in ns since 1970 by the clock of its storage; 0 if it does not exist."""
    filesystem, path = open_storage(file)
    return filesystem.get_file_info(path).mtime_ns or 0


def sha256(file: str) -> str:
    """Return the hexadecimal SHA-256 of a file's content."""
    filesystem, path = open_storage(file)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def upload(source: Path, target: str) -> None:
    """Copy the local file `source` to `target`."""
    filesystem, path = open_storage(target)
    with source.open("rb") as file, filesystem.open_output_stream(path) as stream:
        for count in itertools.count(1):
            chunk = file.read(_CHUNK_BYTES)
            if not chunk:
                break
            stream.write(chunk)
            # An S3 stream uploads in the background and does not limit the data that waits. Without a flush, a file
            # that is read faster than it is sent would be in memory as a whole.
            if count % _CHUNKS_IN_FLIGHT == 0:
                stream.flush()


def download(source: str, target: Path) -> None:
    """Copy the directory `source` to the local directory `target`."""
    from pyarrow import fs

    filesystem, path = open_storage(source)
    fs.copy_files(
        path, str(target), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem()
    )


def _names(location: str, kind: str) -> list[str]:
    from pyarrow import fs

    filesystem, path = open_storage(location)
    found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in found if info.type.name == kind)
