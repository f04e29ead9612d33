"""A lock that many threads hold together, or one thread alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """Held by many threads as `shared()`, or by one as `exclusive()`.

    A thread that waits for exclusive access goes before threads that ask for shared access after it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders = self._waiting_for_exclusive = 0
        self._exclusive = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock beside other shared holders."""
        with self._changed:
            self._changed.wait_for(lambda: not self._exclusive and not self._waiting_for_exclusive)
            self._holders += 1
        try:
            yield
        finally:
            with self._changed:
                self._holders -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock alone."""
        with self._changed:
            self._waiting_for_exclusive += 1
            self._changed.wait_for(lambda: not self._exclusive and not self._holders)
            self._waiting_for_exclusive -= 1
            self._exclusive = True
        try:
            yield
        finally:
            with self._changed:
                self._exclusive = False
                self._changed.notify_all()
