"""Where text comes from: the files of a source, which may be local, built in, or behind a URI."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator
from errno import EACCES
from pathlib import Path

from llama_ray.data.sources.blocks import DamagedError, blocks
from llama_ray.data.sources.data_sets import is_note, other_splits
from llama_ray.data.sources.files import BUILTIN, HTTP, File, open_file, standard_library
from llama_ray.data.sources.formats import Compression, is_archive
from llama_ray.data.sources.hub import hub_files
from llama_ray.data.sources.hub_file import HUB
from llama_ray.data.sources.left_out import (
    ARCHIVE,
    DATA_SET_NOTES,
    EMPTY,
    NOT_A_FILE,
    NOT_UTF8,
    NOWHERE,
    NUL,
    OTHER_SPLIT,
    LeaveOut,
    LeftOut,
    cannot_be_read,
)
from llama_ray.data.sources.remote import bucket_files, http_file, local_path
from llama_ray.data.sources.walk import EVERYTHING, walk
from llama_ray.storage.paths import is_uri

_SNIFFED_BYTES = 8 * 1024


def files(source: str, leave_out: LeaveOut) -> Iterator[File]:
    """Yield all files with text of `source`, in no particular order, and call `leave_out` for everything else in it.

    `source` is 'builtin', a file, a folder (searched recursively), a glob, the URI of a file, a folder or a glob that
    pyarrow reads (`s3://`, `gs://`, `file://` ...), the address of a file (`https://`), or a data set of the
    Hugging Face hub (`hf://NAME`, see `hub_files`). A file without a suffix of `formats` is taken if its first bytes
    are UTF-8 without NUL; one that is named itself is taken for text. Raises SourceError for a URI that
    is not understood, OSError for storage that cannot be read.
    """
    found, named = _found(source, leave_out)
    by_name = {file.name: file for file in found}
    others = other_splits(list(by_name), lambda name: _content(by_name[name]))
    for file in found:
        try:
            reason = OTHER_SPLIT if file.name in others else _reason_against(file, named)
        except OSError as error:
            reason = cannot_be_read(error)
        if reason is None:
            yield file
        else:
            leave_out(LeftOut("file", reason, file.name))


def _found(source: str, leave_out: LeaveOut) -> tuple[list[File], bool]:
    """Return the files of a source, and whether the source is one file that is named itself."""
    scheme, separator, _ = source.partition("://")
    if source == BUILTIN:
        return list(_builtin(leave_out)), False
    if scheme.lower() in HTTP and separator:
        return [http_file(source)], True
    if source.startswith(HUB):
        return hub_files(source, leave_out), False
    if not is_uri(source):
        return _local_source(source, leave_out)
    local = local_path(source)
    return bucket_files(source, leave_out) if local is None else _local_source(local, leave_out)


def _builtin(leave_out: LeaveOut) -> Iterator[File]:
    library = standard_library()
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if not {"site-packages", "dist-packages"} & set(name.parts):
            yield from _local(path, name.as_posix(), leave_out, root=BUILTIN)


def _local_source(source: str, leave_out: LeaveOut) -> tuple[list[File], bool]:
    base = Path(source)
    pattern: tuple[str, ...] = EVERYTHING
    if os.path.lexists(base) and not base.is_dir():
        return list(_local(base, base.name, leave_out)), True
    if glob.has_magic(source) and not base.is_dir():
        first = next(index for index, part in enumerate(base.parts) if glob.has_magic(part))
        base, pattern = Path(*base.parts[:first]), base.parts[first:]
    if not base.is_dir():
        return [], False
    paths = walk(base, pattern, leave_out)
    return [
        file for path in paths for file in _local(path, path.relative_to(base).as_posix(), leave_out)
    ], False


def _local(path: Path, name: str, leave_out: LeaveOut, root: str = "") -> Iterator[File]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            reason = NOT_A_FILE
        elif not os.access(path, os.R_OK, effective_ids=True):
            reason = cannot_be_read(PermissionError(EACCES, os.strerror(EACCES)))
        else:
            location = name if root == BUILTIN else str(path.resolve())
            yield File(name, root, location, status.st_size, status.st_mtime_ns)
            return
    except FileNotFoundError:
        reason = NOWHERE
    except OSError as error:
        reason = cannot_be_read(error)
    leave_out(LeftOut("file", reason, name))


def _reason_against(file: File, named: bool) -> str | None:
    """Return why a file holds no text, as far as its name and its first bytes tell; None if it may."""
    if not file.size and file.root not in HTTP:
        return EMPTY
    if is_archive(file.name):
        return ARCHIVE
    if is_note(file.name):
        return DATA_SET_NOTES
    if named or file.layout.format is not None:
        return None
    return _reason_against_content(_start(file))


def _reason_against_content(start: bytes) -> str | None:
    if b"\0" in start:
        return NUL
    try:
        start.decode()
    except UnicodeDecodeError as error:
        # The end of the sniffed bytes may cut a character in two.
        return None if error.reason == "unexpected end of data" else NOT_UTF8
    return None


def _start(file: File) -> bytes:
    """Return the first bytes of what a file holds."""
    compression = file.layout.compression
    with open_file(file.root, file.path) as stream:
        if compression is Compression.NONE:
            content: bytes = stream.read(_SNIFFED_BYTES)
            return content
        try:
            return next(blocks(stream, compression), b"")[:_SNIFFED_BYTES]
        except DamagedError:
            return b""  # Whoever reads it learns why.


def _content(file: File) -> bytes:
    with open_file(file.root, file.path) as stream:
        content: bytes = stream.read()
    return content
