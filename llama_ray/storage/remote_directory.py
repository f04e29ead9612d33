"""A directory in an object store whose files are read in parts, by many threads, over hours."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from llama_ray.storage import store
from llama_ray.storage.store import StorageError
from llama_ray.utils.errors import first_line, printable
from llama_ray.utils.redact import redact

if TYPE_CHECKING:
    from pyarrow import NativeFile, fs

T = TypeVar("T")

_log = logging.getLogger(__name__)
_FIRST_PATIENCE_S, _LONGEST_PAUSE_S = 10.0, 30.0
_CHECK_EVERY_S = 60.0
# As pyarrow words what S3 refuses.
_NO_BUCKET = ("NO_SUCH_BUCKET", "' not found")
_NO_CONNECTION = "NETWORK_CONNECTION"
_NO_ACCESS = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "UNRECOGNIZED_CLIENT",
    "MISSING_AUTHENTICATION_TOKEN",
    "HTTP status 401",
    "HTTP status 403",
    "permission denied",
)


@dataclass
class _OpenFile:
    handle: NativeFile
    size: int
    modified_ns: int
    checked: float


class RemoteDirectory:
    """The files directly in the directory at the URI `location`, which must not change while they are read.

    `sizes` holds the size in bytes of each file by name; it is empty for a directory that does not exist. What fails
    is tried again for `patience_s` seconds if it may be an outage, but not for long at the beginning, where the URI may
    be wrong. Everything else raises StorageError: a bucket or file that does not exist, missing access, a file that
    changed since it was read first.
    """

    def __init__(self, location: str, patience_s: float = 600) -> None:
        self.location, self._patience_s = location, _FIRST_PATIENCE_S
        self._open: dict[str, _OpenFile] = {}
        self._lock = threading.Lock()
        # What lasts longer than a moment is tried again here.
        short = store.with_short_retries(location)
        self._filesystem: fs.FileSystem
        self._filesystem, self._path = self._patiently("", lambda: store.open_storage(short))
        self.sizes = self._patiently("", self._list)
        self._patience_s = patience_s

    def _list(self) -> dict[str, int]:
        from pyarrow import fs

        try:
            found = self._filesystem.get_file_info(fs.FileSelector(self._path))
        except FileNotFoundError:
            return {}
        return {info.base_name: info.size for info in found if info.is_file}

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes of the file `name` from `start` to `stop`."""
        return self._patiently(name, lambda: self._read(name, start, stop))

    def _read(self, name: str, start: int, stop: int) -> bytes:
        file = self._opened(name)
        data: bytes = file.handle.read_at(stop - start, start)
        if len(data) != stop - start:
            raise OSError(f"{len(data)} of {stop - start} bytes came")
        if time.monotonic() - file.checked > _CHECK_EVERY_S:
            file.checked = time.monotonic()
            self._check_unchanged(name)
        return data

    def _opened(self, name: str) -> _OpenFile:
        with self._lock:
            file = self._open.get(name)
        if file is None:
            path = f"{self._path}/{name}"
            info = self._filesystem.get_file_info(path)
            handle = self._filesystem.open_input_file(path)
            file = _OpenFile(handle, info.size, info.mtime_ns or 0, time.monotonic())
            with self._lock:
                # What was seen first counts, if two threads open it at once.
                file = self._open.setdefault(name, file)
        return file

    def _patiently(self, name: str, operation: Callable[[], T]) -> T:
        """Return the result of `operation` on the file `name`, tried again as long as that may help."""
        started, pause = time.monotonic(), 0.5
        while True:
            try:
                return operation()
            except StorageError:
                raise
            except OSError as error:
                self._raise_if_final(name, error)
                reason = printable(first_line(error))
                if time.monotonic() - started + pause > self._patience_s:
                    raise StorageError(
                        f"{self._named(name)} cannot be read ({reason}); try again when its storage answers"
                    ) from error
                _log.warning("%s: %s; trying again", redact(self._named(name)), reason)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _raise_if_final(self, name: str, error: OSError) -> None:
        text = str(error)
        if any(sign in text for sign in _NO_BUCKET):
            # Not from the OSError here and below, which a run would take for an outage and start again.
            raise StorageError(f"the bucket of {self.location} does not exist; correct the URI") from None
        if any(sign in text for sign in _NO_ACCESS):
            raise StorageError(
                f"{self._named(name)} may not be read ({printable(first_line(error))}); give this machine "
                "credentials that may read and list it"
            ) from None
        # Without a connection, the state of the file cannot be asked for either.
        if name and _NO_CONNECTION not in text:
            try:
                self._check_unchanged(name)
            except StorageError:
                raise
            except OSError as again:
                if again is not error and any(sign in str(again) for sign in (*_NO_BUCKET, *_NO_ACCESS)):
                    self._raise_if_final("", again)

    def _check_unchanged(self, name: str) -> None:
        info = self._filesystem.get_file_info(f"{self._path}/{name}")
        seen = self._open.get(name)
        if not info.is_file:
            state = "does not exist" if seen is None else "does not exist any more"
            raise StorageError(f"{self._named(name)} {state}; put it back, or use another directory")
        if seen and (info.size, info.mtime_ns or 0) != (seen.size, seen.modified_ns):
            raise StorageError(
                f"{self._named(name)} has changed since it was read first; start again with data that stays as it is"
            )

    def _named(self, name: str) -> str:
        return store.join(self.location, name) if name else self.location
