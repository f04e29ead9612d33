"""A run that training logs to without waiting for the tracking server, even if it is unreachable or refuses."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

from llama_ray.tracking.errors import is_passing
from llama_ray.tracking.runs import Point, Run
from llama_ray.utils.errors import first_line

_MAX_POINTS = 100_000
_POINTS_PER_REQUEST = 50
_MAX_WAITING_ACTIONS = 32
_log = logging.getLogger(__name__)

Action = Callable[[Run], None]


class _Piece(NamedTuple):
    """What goes to the server at once: points, or an action."""

    points: list[Point]
    name: str = ""
    action: Action | None = None


class BufferedRun:
    """Logs to a run from its own thread, in order; while the server is unreachable it buffers and retries.

    What the server refuses for good is dropped and counted; a run that was deleted takes nothing from then on. After a
    restart training repeats some steps. Metrics that the run has at these steps are not sent again.

    Args:
        may_send: Asked before each request; once it says no, everything is dropped, because another process logs to the
            run now.
        retry_s: The first pause before a retry and the longest one, in seconds; each pause is twice the one before.
    """

    def __init__(
        self,
        run_id: str,
        uri: str,
        *,
        system_metrics: bool = False,
        may_send: Callable[[], bool] = lambda: True,
        retry_s: tuple[float, float] = (1.0, 30.0),
    ) -> None:
        self.run_id, self._uri, self._system_metrics = run_id, uri, system_metrics
        self._may_send = may_send
        self._first_pause_s, self._longest_pause_s = retry_s
        self._points: deque[Point] = deque()
        self._actions: dict[str, Action] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._last_steps: dict[str, int] = {}
        self._points_per_request = _POINTS_PER_REQUEST
        self._num_refused = 0
        self._refusal = ""
        self._lost = False
        self._thread = threading.Thread(target=self._send_until_closed, name="mlflow", daemon=True)
        self._thread.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue all `metrics` of one step."""
        with self._changed:
            if self._lost:
                self._num_refused += 1
                return
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
            if self._lost:
                self._num_refused += 1
                return
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
        """Send what is queued, within `timeout_s`; return whether all points were sent, and warn if not."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            left = len(self._points)
        if left:
            _log.warning("MLflow stayed unreachable; %d points of run %s are lost", left, self.run_id)
        if self._refusal:
            _log.warning(
                "MLflow refused %d points and artifacts of run %s (%s); they are lost",
                self._num_refused,
                self.run_id,
                self._refusal,
            )
        return not left and not self._num_refused

    def _send_until_closed(self) -> None:
        pause_s = self._first_pause_s
        with contextlib.ExitStack() as until_closed:
            run: Run | None = None
            while piece := self._wait_for_work():
                try:
                    if not self._may_send():
                        self._drop_everything()
                        continue
                    run = run or self._attach(until_closed)
                    self._send(run, piece)
                    pause_s = self._first_pause_s
                # Stores of artifacts raise the exceptions of their own libraries; none may end this thread.
                except Exception as error:
                    if not is_passing(error):
                        self._give_up(run, piece, error)
                        continue
                    _log.warning("MLflow is unreachable; metrics are buffered (%s)", first_line(error))
                    self._pause(pause_s)
                    pause_s = min(2 * pause_s, self._longest_pause_s)

    def _give_up(self, run: Run | None, piece: _Piece, error: Exception) -> None:
        """Drop what the server has refused with `error`: everything, if the run itself does not exist any more."""
        self._refusal = self._refusal or first_line(error)
        if run is None or self._is_gone():
            self._drop_everything()
        elif len(piece.points) > 1:
            # One of them may be to blame for all.
            self._points_per_request = 1
        else:
            self._num_refused += 1
            self._drop(piece)

    def _drop_everything(self) -> None:
        with self._changed:
            self._lost = True
            self._num_refused += len(self._points) + len(self._actions)
            self._points.clear()
            self._actions.clear()

    def _is_gone(self) -> bool:
        try:
            Run.attach(self.run_id, self._uri)
        except Exception as error:
            return not is_passing(error)
        return False

    def _wait_for_work(self) -> _Piece | None:
        """Wait until something is queued and return the oldest points, else the oldest action; None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._points or self._actions or self._closing)
            if self._points:
                return _Piece(list(islice(self._points, self._points_per_request)))
            return _Piece([], *next(iter(self._actions.items()))) if self._actions else None

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

    def _send(self, run: Run, piece: _Piece) -> None:
        if piece.action:
            piece.action(run)
        else:
            run.log_points((step, at, self._new(metrics, step)) for step, at, metrics in piece.points)
            self._points_per_request = min(2 * self._points_per_request, _POINTS_PER_REQUEST)
        self._drop(piece)

    def _drop(self, piece: _Piece) -> None:
        # Meanwhile `log_metrics` may have dropped every second point, and `do` may have replaced the action.
        done = {id(point) for point in piece.points}
        with self._changed:
            first = [self._points.popleft() for _ in range(min(len(done), len(self._points)))]
            self._points.extendleft(point for point in reversed(first) if id(point) not in done)
            if piece.action and self._actions.get(piece.name) is piece.action:
                del self._actions[piece.name]

    def _new(self, metrics: dict[str, float], step: int) -> dict[str, float]:
        return {name: value for name, value in metrics.items() if step > self._last_steps.get(name, -1)}
