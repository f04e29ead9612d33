"""Copies of remote files on this machine, of bounded size, shared by its processes."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from llama_ray.utils.errors import first_line

_log = logging.getLogger(__name__)
_IN_USE = ".in-use"
_PARTIAL = ".partial"
_FREE_BYTES = 2**30
"""What is left free of the disk."""


class FileCache:
    """The files `name` of the directory `key` in `root`; all directories there together hold at most `limit_bytes`.

    As long as a process has this object, the files of `key` stay. Those of directories that no process uses go when
    room is needed, the ones first that were not used for the longest time. A file gets its name when it is complete, so
    that processes may be killed at any time: the system drops their locks, and the rest of a copy is removed later.
    """

    def __init__(self, root: Path, key: str, limit_bytes: int) -> None:
        """Raise OSError if the directory cannot be written to."""
        self._root, self.directory, self._limit = root, root / key, limit_bytes
        self.directory.mkdir(parents=True, exist_ok=True)
        pin = os.open(self.directory / _IN_USE, os.O_RDWR | os.O_CREAT)
        weakref.finalize(self, os.close, pin)
        fcntl.flock(pin, fcntl.LOCK_SH)
        os.utime(pin)

    def find(self, name: str, size: int) -> Path | None:
        """Return the copy of the file `name` of `size` bytes; None if there is none."""
        path = self.directory / name
        try:
            return path if path.stat().st_size == size else None
        except FileNotFoundError:
            return None

    def fill(self, name: str, size: int, write: Callable[[BinaryIO], None]) -> Path | None:
        """Return the copy of the file `name`, which `write` makes unless there is one.

        None if there is no room for `size` bytes, if the directory cannot be written to any more, or if another process
        makes the copy at this time. Errors of `write` leave nothing behind.
        """
        partial = self.directory / f"{name}{_PARTIAL}"
        try:
            return self.find(name, size) or self._fill(partial, name, size, write)
        except OSError as error:
            _log.warning("%s cannot be written: %s", partial, first_line(error))
            return None

    def _fill(self, partial: Path, name: str, size: int, write: Callable[[BinaryIO], None]) -> Path | None:
        with partial.open("ab") as file:
            if not _lock(file) or not _is_at(file, partial):
                # Another process writes it, or has just finished or removed it.
                return self.find(name, size)
            try:
                if found := self.find(name, size):
                    return found
                # What a killed process left must not count beside what takes its place.
                os.ftruncate(file.fileno(), 0)
                if not self._reserve(file, size):
                    return None
                with partial.open("r+b") as target:
                    write(target)
                os.fsync(file.fileno())
                return partial.rename(self.directory / name)
            finally:
                partial.unlink(missing_ok=True)

    def _reserve(self, file: BinaryIO, size: int) -> bool:
        """Give `file` its `size`, if need be in place of other files; return whether there is room for it."""
        with _locked(self._root / ".lock"):
            if self._missing_bytes(size) > 0:
                self._remove_unused(size)
            if self._missing_bytes(size) > 0:
                return False
            # The others count it from now on.
            os.ftruncate(file.fileno(), size)
            return True

    def _missing_bytes(self, size: int) -> int:
        """Return how many bytes must go before `size` more fit."""
        used = sum(map(_size, self._root.glob("*/*")))
        free = shutil.disk_usage(self._root).free - _FREE_BYTES
        return max(used + size - self._limit, size - free)

    def _remove_unused(self, size: int) -> None:
        for partial in self._root.glob(f"*/*{_PARTIAL}"):
            with suppress(FileNotFoundError), partial.open("r+b") as file:
                if _lock(file):
                    partial.unlink()
        for pin in sorted(self._root.glob(f"*/{_IN_USE}"), key=lambda path: path.stat().st_mtime_ns):
            with pin.open("r+b") as file:
                # Not this process's own: its lock is in the way.
                if not _lock(file):
                    continue
                for path in pin.parent.iterdir():
                    if path.name != _IN_USE and path.is_file() and self._missing_bytes(size) > 0:
                        path.unlink()


def _size(path: Path) -> int:
    """Return the size of a file; 0 for a directory, and for a file that another process has just removed."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock(file: BinaryIO) -> bool:
    """Take the lock of `file` for this process alone; return whether it was free."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
