"""Files behind a URI: in an object store, or at an address of the web."""

from __future__ import annotations

import glob
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from llama_ray.data.sources.files import File, SourceError
from llama_ray.data.sources.http_file import look_up
from llama_ray.data.sources.left_out import HIDDEN, LeaveOut, LeftOut
from llama_ray.data.sources.walk import EVERYTHING, is_hidden, matches
from llama_ray.storage import store
from llama_ray.utils.errors import first_line, printable


def http_file(url: str) -> File:
    """Return the file at an address; its last part is the name. Raises SourceError if there is none."""
    try:
        remote = look_up(url)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"cannot read source {printable(url)!r} ({first_line(error)}); check the address and the access to it"
        ) from error
    parts = urlsplit(url)
    name = PurePosixPath(unquote(parts.path)).name or parts.hostname or ""
    return File(name, parts.scheme.lower(), url, remote.size, remote.version, remote.ranges)


def local_path(uri: str) -> str | None:
    """Return the path that a URI such as `file:///data` means on this machine; None if it is elsewhere.

    Raises SourceError for a URI that pyarrow does not understand.
    """
    try:
        system, path = store.open_storage(_base(uri)[0])
    except ValueError as error:  # ArrowInvalid: an unknown scheme or a malformed URI.
        raise SourceError(
            f"cannot read source {printable(uri)!r} ({error}); give a URI that pyarrow can open, such as "
            "s3://bucket/folder"
        ) from error
    if system.type_name != "local":
        return None
    return "/".join([path.rstrip("/"), *_base(uri)[1]])


def bucket_files(uri: str, leave_out: LeaveOut) -> tuple[list[File], bool]:
    """Return the files behind a URI, and whether it is one of them; after '?' it configures the file system."""
    # pyarrow is imported at its first use, because models train and generate on machines that lack it.
    from pyarrow import fs

    base_uri, pattern = _base(uri)
    head, _, options = base_uri.partition("?")
    scheme, _, rest = head.partition("://")
    root = f"{scheme}://{rest.split('/')[0]}/" + (f"?{options}" if options else "")
    system, base = store.open_storage(base_uri)
    found = system.get_file_info(base)
    in_folder = found.type.name == "Directory"
    infos = system.get_file_info(fs.FileSelector(base, recursive=True)) if in_folder else [found]
    files = []
    for info in infos:
        if not info.is_file:
            continue
        name = info.path[len(base) :].strip("/") or info.base_name
        parts = tuple(name.split("/"))
        if in_folder and not matches(parts, pattern or EVERYTHING):
            continue
        if in_folder and any(is_hidden(part, pattern) for part in parts):
            leave_out(LeftOut("file", HIDDEN, name))
        else:
            files.append(File(name, root, info.path, info.size or 0, info.mtime_ns or 0))
    return files, not in_folder


def _base(uri: str) -> tuple[str, tuple[str, ...]]:
    """Return a URI up to its first part that is a glob, and the parts of the glob."""
    head, question, options = uri.partition("?")
    parts = head.split("/")
    first = next((index for index, part in enumerate(parts) if index > 2 and glob.has_magic(part)), None)
    if first is None:
        return uri, ()
    return "/".join(parts[:first]) + question + options, tuple(parts[first:])
