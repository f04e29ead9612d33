"""A run that is logged to from training, which must not wait for the tracking server nor stop when it is away."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from llama_ray.tracking.runs import Point, Run
from llama_ray.tracking.uri import TrackingError
from llama_ray.utils.errors import first_line

_MAX_POINTS = 100_000
_POINTS_AT_ONCE = 50
_MAX_WAITING_ARTIFACTS = 32
_RETRY_S = (1.0, 30.0)
_AWAY = (MlflowException, TrackingError, SQLAlchemyError, OSError)
_log = logging.getLogger(__name__)


class BufferedRun:
    """Sends what is logged from a thread of its own, in order; while the server is away, it keeps and retries.

    Metrics that the run has already, because steps are trained again after a restart, are not sent twice.
    """

    def __init__(self, run_id: str, uri: str, *, system_metrics: bool = False) -> None:
        self.run_id, self._uri, self._system_metrics = run_id, uri, system_metrics
        self._points: deque[Point] = deque()
        self._artifacts: dict[str, Callable[[Run], None]] = {}
        self._lock = threading.Condition()
        self._closing = False
        self._last_steps: dict[str, int] = {}
        self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._thread.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log all `metrics` for one step, as soon as the server takes them."""
        with self._lock:
            if (
                len(self._points) >= _MAX_POINTS
            ):  # half the resolution of a long outage, rather than its beginning
                _log.warning(
                    "MLflow is away for long; every second of %d waiting points is dropped", _MAX_POINTS
                )
                self._points = deque(list(self._points)[::2])
            self._points.append((step, int(time.time() * 1000), dict(metrics)))
            self._lock.notify_all()

    def do(self, name: str, action: Callable[[Run], None]) -> None:
        """Run `action` once all metrics logged before are sent; a waiting one of the same name is replaced."""
        with self._lock:
            self._artifacts.pop(name, None)
            self._artifacts[name] = action
            while len(self._artifacts) > _MAX_WAITING_ARTIFACTS:
                self._artifacts.pop(next(iter(self._artifacts)))
            self._lock.notify_all()

    def unsent(self) -> list[Point]:
        """What the server has not taken yet; kept in checkpoints, so that a crash loses nothing before them."""
        with self._lock:
            return list(self._points)

    def restore(self, points: Iterable[Any]) -> None:
        """Log again what `unsent` returned, ahead of everything else."""
        with self._lock:
            self._points.extendleft(
                (int(step), int(at), dict(metrics)) for step, at, metrics in reversed(list(points))
            )
            self._lock.notify_all()

    def close(self, timeout_s: float = 60.0) -> bool:
        """Send what waits, for at most `timeout_s`; whether all of it was sent."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        self._thread.join(timeout_s)
        with self._lock:
            left = len(self._points)
        if left:
            _log.warning("MLflow did not come back: %d points of run %s are lost", left, self.run_id)
        return not left

    def _send(self) -> None:
        pause_s, run = _RETRY_S[0], None
        with contextlib.ExitStack() as stack:
            while True:
                with self._lock:
                    while not (self._points or self._artifacts or self._closing):
                        self._lock.wait()
                    if self._closing and not (self._points or self._artifacts):
                        return
                try:
                    if run is None:
                        run = Run.attach(self.run_id, self._uri)
                        self._last_steps = run.last_steps()
                        if self._system_metrics:
                            stack.enter_context(run.system_metrics())
                    self._send_some(run)
                    pause_s = _RETRY_S[0]
                except _AWAY as e:
                    _log.warning("MLflow does not answer, metrics wait (%s)", first_line(e))
                    with self._lock:
                        self._lock.wait_for(lambda: self._closing, timeout=pause_s)
                    time.sleep(_RETRY_S[0] if self._closing else 0)
                    pause_s = min(2 * pause_s, _RETRY_S[1])

    def _send_some(self, run: Run) -> None:
        with self._lock:
            points = list(islice(self._points, _POINTS_AT_ONCE))
            name = None if points else next(iter(self._artifacts), None)
            action = self._artifacts.get(name) if name else None
        if points:
            run.log_points((step, at, self._new(metrics, step)) for step, at, metrics in points)
            with self._lock:
                while points and self._points and self._points[0] is points[0]:
                    self._points.popleft()
                    points.pop(0)
        elif action is not None and name is not None:
            action(run)
            with self._lock:
                if self._artifacts.get(name) is action:
                    del self._artifacts[name]

    def _new(self, metrics: dict[str, float], step: int) -> dict[str, float]:
        return {name: value for name, value in metrics.items() if step > self._last_steps.get(name, -1)}
