"""A line of progress, for terminals and logs."""

from __future__ import annotations

import sys
import time


class ProgressLine:
    """One line that is overwritten on a terminal; in a log, a new line every few seconds."""

    EVERY_S = 5.0

    def __init__(self) -> None:
        # Libraries' output may be turned away meanwhile.
        self._stream = sys.stdout
        self._terminal = self._stream.isatty()
        self._open = False
        self._last = -self.EVERY_S

    def show(self, text: str) -> None:
        """Replace the line."""
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", file=self._stream, flush=True)
            self._open = True
        elif time.monotonic() - self._last >= self.EVERY_S:
            print(text, file=self._stream, flush=True)
            self._last = time.monotonic()

    def log(self, text: str) -> None:
        """Print a line that stays."""
        if self._open:
            print(file=self._stream)
            self._open = False
        print(text, file=self._stream, flush=True)
