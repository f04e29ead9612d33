"""A run that training logs to without waiting for the tracking server, even if the server is unreachable."""

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
_POINTS_PER_REQUEST = 50
_MAX_WAITING_ACTIONS = 32
_UNREACHABLE = (MlflowException, TrackingError, SQLAlchemyError, OSError)
_log = logging.getLogger(__name__)

Action = Callable[[Run], None]


class BufferedRun:
    """Logs to a run from its own thread, in order; while the server is unreachable it buffers and retries.

    After a restart training repeats some steps. Metrics that the run has at these steps are not sent again.

    Args:
        retry_s: The first pause before a retry and the longest one, in seconds; each pause is twice the one before.
    """

    def __init__(
        self,
        run_id: str,
        uri: str,
        *,
        system_metrics: bool = False,
        retry_s: tuple[float, float] = (1.0, 30.0),
    ) -> None:
        self.run_id, self._uri, self._system_metrics = run_id, uri, system_metrics
        self._first_pause_s, self._longest_pause_s = retry_s
        self._points: deque[Point] = deque()
        self._actions: dict[str, Action] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._last_steps: dict[str, int] = {}
        self._thread = threading.Thread(target=self._send_until_closed, name="mlflow", daemon=True)
        self._thread.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue all `metrics` of one step."""
        with self._changed:
            if len(self._points) >= _MAX_POINTS:
                # A long outage costs half of the resolution, not its beginning.
                _log.warning(
                    "MLflow is unreachable; every second of %d buffered points is dropped", _MAX_POINTS
                )
                self._points = deque(list(self._points)[::2])
            self._points.append((step, int(time.time() * 1000), dict(metrics)))
            self._changed.notify_all()

    def do(self, name: str, action: Action) -> None:
        """Queue `action` behind all metrics logged so far; it replaces a queued action of the same name."""
        with self._changed:
            self._actions.pop(name, None)
            self._actions[name] = action
            while len(self._actions) > _MAX_WAITING_ACTIONS:
                self._actions.pop(next(iter(self._actions)))
            self._changed.notify_all()

    def unsent(self) -> list[Point]:
        """Return the points that the server has not accepted; a checkpoint keeps them, so a crash loses none."""
        with self._changed:
            return list(self._points)

    def restore(self, points: Iterable[Any]) -> None:
        """Queue what `unsent` returned, in front of everything else."""
        with self._changed:
            self._points.extendleft(
                (int(step), int(at), dict(metrics)) for step, at, metrics in reversed(list(points))
            )
            self._changed.notify_all()

    def close(self, timeout_s: float = 60.0) -> bool:
        """Send what is queued, within `timeout_s`; return whether all points were sent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            left = len(self._points)
        if left:
            _log.warning("MLflow stayed unreachable; %d points of run %s are lost", left, self.run_id)
        return not left

    def _send_until_closed(self) -> None:
        pause_s = self._first_pause_s
        with contextlib.ExitStack() as until_closed:
            run: Run | None = None
            while self._wait_for_work():
                try:
                    run = run or self._attach(until_closed)
                    self._send_some(run)
                    pause_s = self._first_pause_s
                except _UNREACHABLE as error:
                    _log.warning("MLflow is unreachable; metrics are buffered (%s)", first_line(error))
                    self._pause(pause_s)
                    pause_s = min(2 * pause_s, self._longest_pause_s)

    def _wait_for_work(self) -> bool:
        """Wait until something is queued; return False if the run was closed and nothing is."""
        with self._changed:
            self._changed.wait_for(lambda: self._points or self._actions or self._closing)
            return bool(self._points or self._actions)

    def _attach(self, until_closed: contextlib.ExitStack) -> Run:
        run = Run.attach(self.run_id, self._uri)
        self._last_steps = run.last_steps()
        if self._system_metrics:
            until_closed.enter_context(run.system_metrics())
        return run

    def _pause(self, seconds: float) -> None:
        """Wait for `seconds`, or only as long as the first pause once the run is being closed."""
        with self._changed:
            closing = self._changed.wait_for(lambda: self._closing, timeout=seconds)
        if closing:
            time.sleep(self._first_pause_s)

    def _send_some(self, run: Run) -> None:
        """Send the oldest points, or run the oldest action if there are no points."""
        with self._changed:
            points = list(islice(self._points, _POINTS_PER_REQUEST))
            name, action = next(iter(self._actions.items()), ("", None))
        if points:
            run.log_points((step, at, self._new(metrics, step)) for step, at, metrics in points)
            self._drop_sent(points)
        elif action:
            action(run)
            with self._changed:
                if self._actions.get(name) is action:
                    del self._actions[name]

    def _drop_sent(self, points: list[Point]) -> None:
        # `log_metrics` may have dropped every second point meanwhile.
        sent = {id(point) for point in points}
        with self._changed:
            first = [self._points.popleft() for _ in range(min(len(points), len(self._points)))]
            self._points.extendleft(point for point in reversed(first) if id(point) not in sent)

    def _new(self, metrics: dict[str, float], step: int) -> dict[str, float]:
        return {name: value for name, value in metrics.items() if step > self._last_steps.get(name, -1)}
