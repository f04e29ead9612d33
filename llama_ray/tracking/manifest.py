"""What a checkpoint's files must be: noted when it is registered, and compared after it has travelled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TypedDict

from llama_ray.model.adapter_files import is_adapter, open_adapter
from llama_ray.model.weight_files import CheckpointError, open_weights


class FileNote(TypedDict):
    """The size of a file, and the SHA-256 of its content in hexadecimal."""

    bytes: int
    sha256: str


def describe(directory: Path) -> dict[str, FileNote]:
    """Return a note of each file below `directory`, by its relative path. It reads all of them."""
    return {
        str(file.relative_to(directory)): FileNote(bytes=file.stat().st_size, sha256=_sha256(file))
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def sizes(directory: Path) -> dict[str, int]:
    """Return the size in bytes of each file below `directory`, by its relative path."""
    return {
        str(file.relative_to(directory)): file.stat().st_size
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def changed_content(directory: Path, notes: Mapping[str, FileNote]) -> str | None:
    """Return which file below `directory` is not as it was noted; None if all are. It reads all of them."""
    if wrong := changed_size(directory, {name: note["bytes"] for name, note in notes.items()}):
        return wrong
    differing = (name for name, note in notes.items() if _sha256(directory / name) != note["sha256"])
    return next((f"{name} has another content than when it was registered" for name in differing), None)


def changed_size(directory: Path, expected: Mapping[str, int]) -> str | None:
    """Return which file below `directory` is missing or has another size than `expected`; None if all are there."""
    for name, size in expected.items():
        file = directory / name
        if not file.is_file():
            return f"{name} is missing"
        if (found := file.stat().st_size) != size:
            return f"{name} has {found:,} bytes, not {size:,}"
    return None


def unreadable_weights(directory: Path) -> str | None:
    """Return why the weights in `directory` cannot be read, as their index and headers tell; None if they can."""
    try:
        with ExitStack() as stack:
            if is_adapter(directory):
                open_adapter(directory, stack)
            else:
                open_weights(directory, stack)
    except CheckpointError as error:
        return str(error)
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
