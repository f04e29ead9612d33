"""Where text comes from: the files of a source, which may be local, built in, or behind a URI."""

from __future__ import annotations

import functools
import glob
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ray.storage import store
from llama_ray.storage.paths import is_uri
from llama_ray.utils.errors import UserError

if TYPE_CHECKING:
    # pyarrow is imported at its first use, because models train and generate on machines that lack it.
    from pyarrow import fs

BUILTIN = "builtin"
"""The source that is the source code of the running interpreter's standard library."""

_SNIFFED_BYTES = 8 * 1024
_TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".jsonl"})


class SourceError(UserError):
    """A source that cannot be read or holds no text."""


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source.

    `name` is its path relative to the source, so it stays the same when the source moves. `root` and `path` are what
    `open_file` takes: `root` is '' for local files, 'builtin', or the first part of a URI.
    """

    name: str
    root: str
    path: str
    size: int
    modified_ns: int


def files(source: str) -> Iterator[File]:
    """Yield all non-empty text files of `source`, in no particular order.

    `source` is 'builtin', a file, a folder (searched recursively, without hidden and binary files), a glob, or the URI
    of a file or folder that pyarrow reads (`s3://`, `gs://`, `file://` ...). A file that is named itself is taken
    for text. Raises SourceError for a URI that pyarrow does not understand, OSError for storage that cannot be read.
    """
    if source == BUILTIN:
        yield from _builtin()
    elif is_uri(source):
        yield from _remote(source)
    elif Path(source).is_file():
        yield from _local(Path(source), Path(source).name)
    elif Path(source).is_dir():
        yield from _folder(Path(source))
    elif glob.has_magic(source):
        yield from _glob(source)


def open_file(root: str, path: str) -> Any:
    """Open the file with these fields of a `File`: binary and seekable. Files behind a URI have no `readline`."""
    if root == BUILTIN:
        return (_stdlib() / path).open("rb")
    if root == "":
        return Path(path).open("rb")
    return _file_system(root).open_input_file(path)


def _builtin() -> Iterator[File]:
    stdlib = _stdlib()
    for path in stdlib.rglob("*.py"):
        name = path.relative_to(stdlib)
        if not {"site-packages", "dist-packages"} & set(name.parts):
            yield from _local(path, name.as_posix(), BUILTIN)


def _folder(folder: Path) -> Iterator[File]:
    for directory, subdirectories, names in os.walk(folder):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        paths = [Path(directory, name) for name in names if not name.startswith(".")]
        for path in paths:
            if _is_text(path.name, "", str(path)):
                yield from _local(path, path.relative_to(folder).as_posix())


def _glob(pattern: str) -> Iterator[File]:
    parts = Path(pattern).parts
    first_wildcard = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:first_wildcard])
    for match in glob.iglob(pattern, recursive=True):  # noqa: PTH207 (Path.glob takes no absolute patterns)
        path = Path(match)
        if path.is_file() and _is_text(path.name, "", match):
            yield from _local(path, path.relative_to(base).as_posix())


def _local(path: Path, name: str, root: str = "") -> Iterator[File]:
    status = path.stat()
    if status.st_size:
        location = name if root == BUILTIN else str(path.resolve())
        yield File(name, root, location, status.st_size, status.st_mtime_ns)


def _remote(uri: str) -> Iterator[File]:
    """Yield the files behind a URI; what follows '?' configures the file system (`endpoint_override` ...)."""
    from pyarrow import fs

    head, _, options = uri.partition("?")
    scheme, _, rest = head.partition("://")
    root = f"{scheme}://{rest.split('/')[0]}/" + (f"?{options}" if options else "")
    try:
        system, base = store.open_storage(uri)
    except ValueError as error:  # ArrowInvalid: an unknown scheme or a malformed URI.
        raise SourceError(
            f"cannot read source {uri!r} ({error}); give a URI that pyarrow can open, such as s3://bucket/folder"
        ) from error
    found = system.get_file_info(base)
    is_directory = found.type.name == "Directory"
    infos = system.get_file_info(fs.FileSelector(base, recursive=True)) if is_directory else [found]
    for info in infos:
        name = info.path[len(base) :].strip("/") or info.base_name
        hidden = any(part.startswith(".") for part in name.split("/"))
        wanted = info.is_file and info.size and not hidden
        if wanted and _is_text(info.base_name, root, info.path):
            yield File(name, root, info.path, info.size, info.mtime_ns or 0)


def _is_text(name: str, root: str, path: str) -> bool:
    """Whether the suffix is one of text, or else the first bytes are UTF-8 without NUL."""
    if Path(name).suffix.lower() in _TEXT_SUFFIXES:
        return True
    try:
        with open_file(root, path) as file:
            start = file.read(_SNIFFED_BYTES)
        start.decode()
    except UnicodeDecodeError as error:
        # The end of the sniffed bytes may cut a character in two.
        return error.reason == "unexpected end of data" and b"\0" not in start
    except OSError:
        return False
    return b"\0" not in start


@functools.lru_cache(maxsize=8)
def _file_system(root: str) -> fs.FileSystem:
    # Cached because finding the region of a bucket takes a round trip.
    from pyarrow import fs

    return fs.FileSystem.from_uri(root)[0]


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))
