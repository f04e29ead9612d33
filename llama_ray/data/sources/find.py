"""Where text comes from: the files of a source, which may be local, built in, or behind a URI."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator
from errno import EACCES
from pathlib import Path

from llama_ray.data.sources.files import (
    BUILTIN,
    File,
    SourceError,
    is_compressed,
    is_json_lines,
    open_file,
    standard_library,
    suffix,
)
from llama_ray.data.sources.left_out import (
    COMPRESSED,
    EMPTY,
    HIDDEN,
    NOT_A_FILE,
    NOT_UTF8,
    NOWHERE,
    NUL,
    LeaveOut,
    LeftOut,
    cannot_be_read,
)
from llama_ray.data.sources.walk import EVERYTHING, walk
from llama_ray.storage import store
from llama_ray.storage.paths import is_uri
from llama_ray.utils.errors import printable

_SNIFFED_BYTES = 8 * 1024
_TEXT = frozenset({".txt", ".md", ".rst", ".py"})


def files(source: str, leave_out: LeaveOut) -> Iterator[File]:
    """Yield all text files of `source`, in no particular order, and call `leave_out` for everything else in it.

    `source` is 'builtin', a file, a folder (searched recursively), a glob, or the URI of a file or folder that pyarrow
    reads (`s3://`, `gs://`, `file://` ...). A file is text if its suffix, in any case, is one of text, or else if its
    first bytes are UTF-8 without NUL; one that is named itself is taken for text. Raises SourceError for a URI
    that pyarrow does not understand, OSError for storage that cannot be read.
    """
    if source == BUILTIN:
        yield from _builtin(leave_out)
    elif is_uri(source):
        yield from _remote(source, leave_out)
    else:
        yield from _local_source(source, leave_out)


def _builtin(leave_out: LeaveOut) -> Iterator[File]:
    library = standard_library()
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if not {"site-packages", "dist-packages"} & set(name.parts):
            yield from _local(path, name.as_posix(), leave_out, root=BUILTIN)


def _local_source(source: str, leave_out: LeaveOut) -> Iterator[File]:
    base = Path(source)
    pattern: tuple[str, ...] = EVERYTHING
    if os.path.lexists(base) and not base.is_dir():
        yield from _local(base, base.name, leave_out, named=True)
        return
    if glob.has_magic(source) and not base.is_dir():
        first = next(index for index, part in enumerate(base.parts) if glob.has_magic(part))
        base, pattern = Path(*base.parts[:first]), base.parts[first:]
    if base.is_dir():
        for path in walk(base, pattern, leave_out):
            yield from _local(path, path.relative_to(base).as_posix(), leave_out)


def _local(
    path: Path, name: str, leave_out: LeaveOut, *, root: str = "", named: bool = False
) -> Iterator[File]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            reason: str | None = NOT_A_FILE
        elif not os.access(path, os.R_OK, effective_ids=True):
            raise PermissionError(EACCES, os.strerror(EACCES))
        else:
            location = name if root == BUILTIN else str(path.resolve())
            file = File(name, root, location, status.st_size, status.st_mtime_ns)
            reason = _reason_against(file, named)
    except FileNotFoundError:
        reason = NOWHERE
    except OSError as error:
        reason = cannot_be_read(error)
    if reason is None:
        yield file
    else:
        leave_out(LeftOut("file", reason, name))


def _remote(uri: str, leave_out: LeaveOut) -> Iterator[File]:
    """Yield the files behind a URI; what follows '?' configures the file system (`endpoint_override` ...)."""
    # pyarrow is imported at its first use, because models train and generate on machines that lack it.
    from pyarrow import fs

    head, _, options = uri.partition("?")
    scheme, _, rest = head.partition("://")
    root = f"{scheme}://{rest.split('/')[0]}/" + (f"?{options}" if options else "")
    try:
        system, base = store.open_storage(uri)
    except ValueError as error:  # ArrowInvalid: an unknown scheme or a malformed URI.
        raise SourceError(
            f"cannot read source {printable(uri)!r} ({error}); give a URI that pyarrow can open, such as "
            "s3://bucket/folder"
        ) from error
    if system.type_name == "local":
        yield from _local_source(base, leave_out)
        return
    found = system.get_file_info(base)
    in_folder = found.type.name == "Directory"
    infos = system.get_file_info(fs.FileSelector(base, recursive=True)) if in_folder else [found]
    for info in infos:
        if not info.is_file:
            continue
        name = info.path[len(base) :].strip("/") or info.base_name
        file = File(name, root, info.path, info.size or 0, info.mtime_ns or 0)
        hidden = in_folder and any(part.startswith(".") for part in name.split("/"))
        try:
            reason = HIDDEN if hidden else _reason_against(file, named=not in_folder)
        except OSError as error:
            reason = cannot_be_read(error)
        if reason is None:
            yield file
        else:
            leave_out(LeftOut("file", reason, name))


def _reason_against(file: File, named: bool) -> str | None:
    """Return why a file is not text, as far as its name and its first bytes tell; None if it is."""
    if not file.size:
        return EMPTY
    if is_compressed(file.name):
        return COMPRESSED
    if named or is_json_lines(file.name) or suffix(file.name) in _TEXT:
        return None
    with open_file(file.root, file.path) as stream:
        start: bytes = stream.read(_SNIFFED_BYTES)
    if b"\0" in start:
        return NUL
    try:
        start.decode()
    except UnicodeDecodeError as error:
        # The end of the sniffed bytes may cut a character in two.
        return None if error.reason == "unexpected end of data" else NOT_UTF8
    return None
