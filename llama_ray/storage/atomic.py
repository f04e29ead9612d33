"""Atomic writes of local files: a reader sees the old file or the new one, never an incomplete one."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; the file written to it replaces `path` when the block ends.

    The content is on disk before the file is renamed, so a crash or power cut leaves the old file or the new one. If
    the block raises, `path` stays as it was and the temporary file is removed.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a binary stream whose content replaces `path` when the block ends; see `replacing_path`."""
    with replacing_path(path) as partial, partial.open("wb") as stream:
        yield stream


def write_text(path: Path, text: str) -> None:
    """Replace the content of the file `path` by `text`."""
    with replacing(path) as file:
        file.write(text.encode())


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
