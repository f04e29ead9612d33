"""Whether a replica makes progress: what Serve is told, and a thread that ends a process that is stuck."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from llama_ray.generation.completion import GenerationError

_LOOKS = 20
"""Looks within `stuck_after_s`."""
_LATE = 5
"""Looks that may be missed: a watchdog that sleeps longer was not running, and neither were the engines."""
_STDERR = 2


class Observed(Protocol):
    """What is watched of an engine."""

    @property
    def ended(self) -> str | None:
        """Why the engine has ended; None while it runs."""

    @property
    def stalled_s(self) -> float:
        """Seconds since the step in progress began, 0 if there is none."""


class StallMeter:
    """Measures for how long a step has not ended, by looks each `period_s` seconds or somewhat less often.

    Only time between looks counts: one that comes late was not made because the process was stopped or the machine
    suspended, and then steps did not go on either. `now` is in seconds of `time.monotonic`.
    """

    def __init__(self, period_s: float, now: float) -> None:
        self.stalled_s = 0.0
        self._period_s, self._looked_at = period_s, now

    def look(self, stalled_s: float, now: float) -> float:
        """Return for how long a step was seen that has not ended yet, according to `stalled_s` of all engines."""
        passed_s, self._looked_at = now - self._looked_at, now
        seen_s = self.stalled_s + passed_s if passed_s < _LATE * self._period_s else 0.0
        self.stalled_s = min(stalled_s, seen_s)
        return self.stalled_s


class Watchdog:
    """Looks in a thread whether the steps of `engines()` end, and calls `stuck` when one takes `stuck_after_s`.

    By default `stuck` is `die`, because Serve would wait for the requests of a replica that it stops, which hang. Then
    connections break, and the API moves its streams to other replicas.
    """

    def __init__(
        self,
        engines: Callable[[], Iterable[Observed]],
        stuck_after_s: float,
        stuck: Callable[[str], None] | None = None,
    ) -> None:
        self._engines, self._stuck_after_s, self._stuck = engines, stuck_after_s, stuck or die
        self._period_s = stuck_after_s / _LOOKS
        self._meter = StallMeter(self._period_s, time.monotonic())
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def check(self) -> None:
        """Raise GenerationError if an engine has ended or is stuck."""
        for engine in self._engines():
            if engine.ended is not None:
                raise GenerationError(engine.ended)
        if self._meter.stalled_s > self._stuck_after_s:
            raise GenerationError(self._message)

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    @property
    def _message(self) -> str:
        return (
            f"a step of the engine has not ended within stuck_after_s, {self._stuck_after_s:g} s; raise it if steps of "
            "this model take so long"
        )

    def _watch(self) -> None:
        while not self._stopped.wait(self._period_s):
            stalls = [engine.stalled_s for engine in self._engines() if engine.ended is None]
            if self._meter.look(max(stalls, default=0.0), time.monotonic()) > self._stuck_after_s:
                self._stuck(self._message)
                return


def die(reason: str) -> None:
    """Write the stacks of all threads to stderr, and end this process at once."""
    try:
        # No logger, which may wait for a lock that a stuck thread holds.
        os.write(_STDERR, f"{reason}; the process ends. What its threads do:\n".encode())
        faulthandler.dump_traceback(_STDERR)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)
