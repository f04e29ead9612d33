"""One launch at a time in the directory of a run."""

from __future__ import annotations

import errno
import fcntl
import logging
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from llama_ray.storage import atomic, store
from llama_ray.storage.store import StorageError
from llama_ray.utils.errors import first_line
from llama_ray.utils.redact import redact

_LOCK_FILE = ".launch.lock"
_WANTED, _HELD = ".launch-wanted-", ".launch-held-"
_POLL_S = 0.5
_log = logging.getLogger(__name__)


@contextmanager
def claimed(
    directory: str, *, take_over: bool = False, renew_s: float = 5.0, stale_s: float = 20.0
) -> Iterator[None]:
    """Hold `directory`, which is created if it is new, until the exit. Raises StorageError if another launch holds it.

    On a file system this is a lock, which ends with the process. An object store has no locks: there an object says who
    holds the directory. Its owner writes it again every `renew_s`; after `stale_s` without that, its owner is dead.
    With `take_over` the directory is held from now on whoever else holds it: `attempts` then fences the other one off.
    """
    try:
        store.make_directory(directory)
        filesystem, path = store.open_storage(directory)
        lock = _lock_file(Path(path), take_over) if filesystem.type_name == "local" else None
    except OSError as error:
        raise StorageError(
            f"{directory} cannot be written ({first_line(error)}); give another --output_dir"
        ) from error
    if lock is not None:
        with lock:
            if _lock(lock.fileno(), directory):
                yield
                return
    # Not all mounted storage has locks.
    with _held_object(directory, renew_s, stale_s, take_over):
        yield


def _lock_file(directory: Path, take_over: bool) -> IO[bytes]:
    """Open the file to lock; a new one that takes the place of the old one, which stays locked, for `take_over`."""
    if take_over:
        atomic.write_text(directory / _LOCK_FILE, "")
    return (directory / _LOCK_FILE).open("wb")


def _lock(file: int, directory: str) -> bool:
    """Lock the open file; return False where that is not possible. Raises StorageError if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _in_use(directory) from error
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            return False
        raise StorageError(
            f"{directory} cannot be locked ({error.strerror}); give another --output_dir"
        ) from error
    return True


@contextmanager
def _held_object(directory: str, renew_s: float, stale_s: float, take_over: bool) -> Iterator[None]:
    token = secrets.token_hex(8)
    wanted, held = (store.join(directory, prefix + token) for prefix in (_WANTED, _HELD))
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(renew_s):
            with suppress(OSError):
                store.write_text(held, "")

    store.write_text(wanted, "")
    try:
        if not take_over:
            _wait_for_others(directory, token, stale_s)
        store.write_text(held, "")
    finally:
        store.delete(wanted)
    renewing = threading.Thread(target=renew, name="claim", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        with suppress(OSError):
            store.delete(held)


def _wait_for_others(directory: str, token: str, stale_s: float) -> None:
    """Return once no other launch has a claim; raise StorageError if one lives, or came with a smaller token.

    Each launch writes its claim before it looks, so of two that come at once, one at least sees the other: the larger
    token leaves at once, and the smaller one waits whether the other, which may not have seen it, leaves or holds.
    """
    first_seen: dict[str, tuple[int, float]] = {}
    while others := {name: at for name, at in _claims(directory).items() if not name.endswith(token)}:
        if not first_seen:
            _log.warning(
                "another launch may use %s; waiting %.0f s for a sign of it", redact(directory), stale_s
            )
        for name, modified_ns in others.items():
            then_ns, since = first_seen.setdefault(name, (modified_ns, time.monotonic()))
            if modified_ns != then_ns or (name.startswith(_WANTED) and name < _WANTED + token):
                raise _in_use(directory)
            if time.monotonic() - since > stale_s:
                store.delete(store.join(directory, name))
        time.sleep(_POLL_S)


def _claims(directory: str) -> dict[str, int]:
    """Return name -> time of modification in ns of the claims in `directory`."""
    names = [name for name in store.list_files(directory) if name.startswith((_WANTED, _HELD))]
    found = {name: store.modified_ns(store.join(directory, name)) for name in names}
    return {name: modified_ns for name, modified_ns in found.items() if modified_ns}


def _in_use(directory: str) -> StorageError:
    return StorageError(f"{directory} is in use by another launch; wait for it, or give another --run_name")
