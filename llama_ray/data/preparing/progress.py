"""How far a preparation has come: lines with speed and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable

Log = Callable[[str], None]

_LINE_EVERY_S = 5.0


class Progress:
    """Logs what part of a known number of bytes is done: at the beginning, at the end, and every few seconds between.

    Parts that an earlier process did count as done, but not for the speed.
    """

    def __init__(self, verb: str, parts: int, total: int, log: Log) -> None:
        """Begin with `parts` parts of `total` bytes in all; `verb` says what is done to them ('tokenised')."""
        self._verb, self._parts, self._total, self._log = verb, parts, total, log
        self._started = self._last_line = time.monotonic()
        self._done_parts = self._done = self._new = 0
        self._last_line -= _LINE_EVERY_S

    def skip(self, parts: int, size: int) -> None:
        """Count `parts` parts of `size` bytes that were done before."""
        self._done_parts += parts
        self._done += size

    def add(self, size: int, detail: str = "") -> None:
        """Count one part of `size` bytes; `detail` is added to a line that is due."""
        self._done_parts += 1
        self._done += size
        self._new += size
        now = time.monotonic()
        if now - self._last_line < _LINE_EVERY_S and self._done_parts < self._parts:
            return
        self._last_line = now
        passed = max(now - self._started, 1e-3)
        left = (self._total - self._done) * passed / max(self._new, 1)
        end = f"{duration(left)} left" if self._done_parts < self._parts else f"took {duration(passed)}"
        self._log(
            f"{self._verb} {self._done_parts:,} of {self._parts:,} parts, {self._done / 1e6:,.1f} of "
            f"{self._total / 1e6:,.1f} MB{detail}, {self._new / passed / 1e6:.1f} MB/s, {end}"
        )


def duration(seconds: float) -> str:
    """Return a time such as `7 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
