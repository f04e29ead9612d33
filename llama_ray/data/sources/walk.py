"""The files below a folder whose paths match a pattern."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from llama_ray.data.sources.left_out import (
    HIDDEN,
    MATCHED_FOLDER,
    TAKEN_ALREADY,
    LeaveOut,
    LeftOut,
    cannot_be_read,
)

EVERYTHING = ("**",)

Parts = tuple[str, ...]


def walk(base: Path, pattern: Parts, leave_out: LeaveOut) -> Iterator[Path]:
    """Yield all that is not a folder below `base` and matches `pattern`, whose parts are globs; `**` is any folders.

    Links to folders are followed, but never into a folder that is taken already, so that they cannot form a circle.
    What is hidden is left out, unless a part of the pattern begins with a dot. Raises OSError if `base` cannot be read.
    """
    folders = [base]
    taken = [base.resolve()]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if folder == base:
                raise
            leave_out(LeftOut("folder", cannot_be_read(error), folder.relative_to(base).as_posix()))
            continue
        for entry in entries:
            path = folder / entry.name
            parts = path.relative_to(base).parts
            is_folder = _is_folder(entry)
            matched, leads_on = matches(parts, pattern), is_folder and _leads_on(parts, pattern)
            if not matched and not leads_on:
                continue
            name = "/".join(parts)
            if is_hidden(entry.name, pattern):
                leave_out(LeftOut("folder" if is_folder else "file", HIDDEN, name))
            elif not is_folder:
                yield path
            elif not leads_on:
                leave_out(LeftOut("folder", MATCHED_FOLDER, name))
            elif entry.is_symlink() and not _take(path.resolve(), taken):
                leave_out(LeftOut("folder", TAKEN_ALREADY, name))
            else:
                folders.append(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # Whoever opens it as a file learns why.


def _take(target: Path, taken: list[Path]) -> bool:
    """Add the target of a link to the folders that are taken, unless it is in one of them or one of them in it."""
    if any(target.is_relative_to(folder) or folder.is_relative_to(target) for folder in taken):
        return False
    taken.append(target)
    return True


def matches(parts: Parts, pattern: Parts) -> bool:
    """Whether the parts of a path match those of a pattern."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return matches(parts, pattern[1:]) or (bool(parts) and matches(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def _leads_on(parts: Parts, pattern: Parts) -> bool:
    """Whether something in the folder `parts` can match."""
    for part, wanted in zip(parts, pattern, strict=False):
        if wanted == "**":
            return True
        if not fnmatchcase(part, wanted):
            return False
    return len(parts) < len(pattern)


def is_hidden(name: str, pattern: Parts) -> bool:
    """Whether a name begins with a dot, and no part of the pattern asks for that."""
    return name.startswith(".") and not any(
        part.startswith(".") and fnmatchcase(name, part) for part in pattern
    )
