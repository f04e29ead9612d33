"""An engine that answers requests of many threads, and is replaced by a new one when it crashes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from llama_ray.generation.completion import GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.engine_thread import EngineThread, Item
from llama_ray.generation.request import Prompt
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import Delta
from llama_ray.utils.panics import panics_as_errors


class EngineCrashed(RuntimeError):
    """The engine's step raised an error: all of its requests are lost, whichever of them was the cause."""


class EngineLost(RuntimeError):
    """After a crash, no new engine could be made in this process."""


class EngineLoop:
    """Runs an engine while it has work. A crash fails the requests in flight, and the next request gets a new engine.

    `load` makes an engine; the constructor raises what its first call raises.
    """

    def __init__(self, load: Callable[[], Engine]) -> None:
        self._load = load
        self._thread: EngineThread[_Answer] | None = EngineThread(load(), _deliver)
        # Guards _thread.
        self._lock = threading.Lock()

    def submit(
        self, prompt: Prompt, sampling_params: SamplingParams, adapter: str | None = None
    ) -> tuple[int, Future[list[Delta]]]:
        """Queue a request; return the number of its prompt tokens and the future of its `n` candidates.

        Each candidate is all of its deltas joined; `error` is set if it could not be finished. The future raises
        EngineCrashed. Raises ValueError for a request that cannot be served, and EngineLost.
        """
        answer = _Answer(sampling_params.n)
        with self._lock:
            thread = self._running_thread()
        ids = thread.engine.encode(prompt, adapter=adapter)
        try:
            # Without the lock: compiling the grammar of one row delays no other.
            thread.add(thread.engine.prepare(ids, sampling_params, adapter=adapter), answer)
        except GenerationError as error:
            # The engine has crashed since `_running_thread` looked.
            answer.receive(error)
        return len(ids), answer.future

    def _running_thread(self) -> EngineThread[_Answer]:
        """Return the engine's thread, after a crash one with a new engine."""
        if self._thread is not None and self._thread.ended is not None:
            self._thread.stop()
            # Before a new engine is loaded the old one's memory must be free.
            self._thread = None
        if self._thread is None:
            try:
                with panics_as_errors():
                    self._thread = EngineThread(self._load(), _deliver)
            except Exception as error:
                raise EngineLost(f"{type(error).__name__}: {error}") from error
        return self._thread


class _Answer:
    """Collects the deltas of a request's `n` candidates."""

    def __init__(self, n: int) -> None:
        self.future: Future[list[Delta]] = Future()
        self._deltas: list[list[Delta]] = [[] for _ in range(n)]
        self._unfinished = n

    def receive(self, item: Item) -> None:
        """Take what a step gave, or the error that ended the engine."""
        if isinstance(item, GenerationError):
            self.future.set_exception(EngineCrashed(str(item)))
            return
        for delta in item:
            self._deltas[delta.index].append(delta)
            self._unfinished -= delta.finish_reason is not None
        if not self._unfinished:
            self.future.set_result([Delta.joined(deltas) for deltas in self._deltas])


def _deliver(items: list[tuple[_Answer, Item]]) -> None:
    for answer, item in items:
        answer.receive(item)
