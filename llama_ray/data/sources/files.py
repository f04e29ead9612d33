"""The files of a source: what identifies one, how it is opened, and whether it is still the one that was found."""

from __future__ import annotations

import functools
import os
import sysconfig
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from llama_ray.storage import store
from llama_ray.utils.errors import UserError

if TYPE_CHECKING:
    from pyarrow import fs

BUILTIN = "builtin"
"""The source that is the source code of the running interpreter's standard library."""

_JSON_LINES = frozenset({".jsonl", ".ndjson"})
_COMPRESSED = frozenset(
    {".7z", ".br", ".bz2", ".gz", ".lz4", ".lzma", ".tgz", ".xz", ".z", ".zip", ".zst", ".zstd"}
)


class SourceError(UserError):
    """A source that cannot be read or holds no text."""


class File(NamedTuple):
    """A file of a source.

    `name` is its path relative to the source, so it stays the same when the source moves. `root` and `path` are what
    `open_file` takes: `root` is '' for local files, 'builtin', or the first part of a URI.
    """

    name: str
    root: str
    path: str
    size: int
    modified_ns: int


def open_file(root: str, path: str) -> Any:
    """Open the file with these fields of a `File`: binary and seekable. Files behind a URI have no `readline`."""
    if root == BUILTIN:
        return (standard_library() / path).open("rb")
    if root == "":
        return Path(path).open("rb")
    return _file_system(root).open_input_file(path)


def has_changed(file: File, stream: Any) -> bool:
    """Whether the file that was opened as `stream` is not what `file` says.

    Of files behind a URI, and of built-in ones, which each node installed at another time, only the size is compared.
    """
    if file.root not in ("", BUILTIN):
        return bool(stream.size() != file.size)
    status = os.fstat(stream.fileno())
    return status.st_size != file.size or (file.root == "" and status.st_mtime_ns != file.modified_ns)


def suffix(name: str) -> str:
    """Return the last suffix of a file's name in lower case, such as '.txt', or ''."""
    return PurePosixPath(name).suffix.lower()


def is_json_lines(name: str) -> bool:
    """Whether each line of a file of this name holds a record."""
    return suffix(name) in _JSON_LINES


def is_compressed(name: str) -> bool:
    """Whether a file of this name is compressed."""
    return suffix(name) in _COMPRESSED


def standard_library() -> Path:
    """Return the folder of the built-in source."""
    return Path(sysconfig.get_path("stdlib"))


@functools.lru_cache(maxsize=8)
def _file_system(root: str) -> fs.FileSystem:
    # Cached because finding the region of a bucket takes a round trip.
    return store.open_storage(root)[0]
