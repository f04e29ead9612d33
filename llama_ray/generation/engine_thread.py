"""An engine that a thread of its own runs, for callers that wait in other threads or in an event loop."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from llama_ray.generation.completion import GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.request import Done, Prompt, Request
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import Delta

_log = logging.getLogger(__name__)

Receiver = TypeVar("Receiver")
Result = TypeVar("Result")
Item = list[Delta] | GenerationError
"""What one step gave a request, or why the engine has ended."""
Deliver = Callable[[list[tuple[Receiver, Item]]], None]


@dataclass
class _Unfinished(Generic[Receiver]):
    receiver: Receiver
    candidates: int
    """How many have not finished."""


class EngineThread(Generic[Receiver]):
    """Runs an engine's steps while there is work, and sleeps while there is none.

    After each step `deliver` is called once, in the thread, with what the step gave to the receivers of all requests.
    It must not wait, because submissions and the next step wait for it. When the engine ends, each receiver with an
    unfinished request gets a GenerationError. From now on the engine belongs to this object: nothing else may call its
    `step` or `generate`.
    """

    def __init__(self, engine: Engine, deliver: Deliver[Receiver]) -> None:
        self.engine = engine
        self._deliver = deliver
        self._requests: dict[int, _Unfinished[Receiver]] = {}
        self._calls: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._ended: str | None = None
        # When the last step ended, or work came to an idle engine; None while there is no work. Reading it takes no
        # lock, which a step or a delivery that hangs might hold.
        self._progress_at: float | None = None
        # Guards _requests, _ended and what is written to _progress_at.
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> str | None:
        """Why the engine has ended, by a crash or by `stop`; None while it runs."""
        if self._ended is None and not self._thread.is_alive():
            return "the engine's thread is gone"
        return self._ended

    @property
    def stalled_s(self) -> float:
        """Seconds for which there has been work and no step has ended; 0 while there is no work. Never waits."""
        since = self._progress_at
        return 0.0 if since is None else time.monotonic() - since

    def submit(
        self, prompt: Prompt, sampling_params: SamplingParams, receiver: Receiver, done: Done | None = None
    ) -> int:
        """Queue a request, or with `done` the rest of one (see `Engine.prepare`); return its id.

        Raises ValueError if it cannot be served, and GenerationError if the engine has ended.
        """
        return self.add(self.engine.prepare(prompt, sampling_params, done), receiver)

    def add(self, request: Request, receiver: Receiver) -> int:
        """Queue a request that the engine has prepared; return its id. Raises GenerationError as `submit` does."""
        with self._wake:
            if self.ended is not None:
                raise GenerationError(self.ended)
            request_id = self.engine.add(request)
            if request.sequences:
                self._requests[request_id] = _Unfinished(receiver, len(request.sequences))
            if self._progress_at is None:
                self._progress_at = time.monotonic()
            self._wake.notify()
        return request_id

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Have the thread call `function` between two steps, which wait for it; return what will be its result.

        Raises GenerationError if the engine has ended; a call that waits then is cancelled.
        """
        future: Future[Result] = Future()
        with self._wake:
            if self.ended is not None:
                raise GenerationError(self.ended)
            self._calls.append((function, cast("Future[object]", future)))
            if self._progress_at is None:
                self._progress_at = time.monotonic()
            self._wake.notify()
        return future

    def abort(self, request_id: int) -> None:
        """Drop a request, whose receiver gets nothing more; do nothing if it is finished or unknown."""
        with self._wake:
            unfinished = self._requests.pop(request_id, None)
        if unfinished is not None:
            self.engine.abort(request_id)

    def stop(self) -> None:
        """End the thread after its current step, and close the engine."""
        self._end("the engine was stopped")
        self._thread.join()
        self.engine.close()
        # Now the engine is free without the garbage collector: `deliver` often belongs to the owner of this object, and
        # Ray Serve excludes from collections whatever a replica has made by the time that it starts.
        self._deliver = _drop

    def _run(self) -> None:
        reason = "the engine's thread ended"
        try:
            while self._wait_for_work():
                self._call_next()
                by_request: dict[int, list[Delta]] = defaultdict(list)
                for delta in self.engine.step():
                    by_request[delta.request_id].append(delta)
                with self._wake:
                    self._progress_at = time.monotonic()
                    known = [(i, deltas) for i, deltas in by_request.items() if i in self._requests]
                    self._deliver([(self._requests[i].receiver, deltas) for i, deltas in known])
                    # Only now: if a delivery crashes, all of them hear of it.
                    for request_id, deltas in known:
                        self._count(request_id, deltas)
        except BaseException as error:
            reason = f"the engine crashed: {type(error).__name__}: {error}"
            _log.exception("the engine's thread ends")
        finally:
            # Whatever it was, the receivers must hear of it.
            self._end(reason)

    def _count(self, request_id: int, deltas: list[Delta]) -> None:
        """Note which candidates of a request have finished, and forget it after the last one."""
        request = self._requests.get(request_id)
        if request is None:
            # The delivery has aborted it.
            return
        request.candidates -= sum(delta.finish_reason is not None for delta in deltas)
        if not request.candidates:
            del self._requests[request_id]

    def _call_next(self) -> None:
        if not self._calls:
            return
        function, future = self._calls.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    def _wait_for_work(self) -> bool:
        """Sleep until there is work (True) or the engine has ended (False)."""
        with self._wake:
            while self._ended is None and not self._calls and not self.engine.has_work:
                self._progress_at = None
                self._wake.wait()
            return self._ended is None

    def _end(self, reason: str) -> None:
        with self._wake:
            self._ended = self._ended or reason
            requests, self._requests = self._requests, {}
            while self._calls:
                self._calls.popleft()[1].cancel()
            error = GenerationError(self._ended)
            self._deliver([(request.receiver, error) for request in requests.values()])
            self._wake.notify()


def _drop(items: list[tuple[Receiver, Item]]) -> None:
    """Deliver to nobody, since the engine has ended."""
