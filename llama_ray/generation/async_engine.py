"""The engine in a thread of its own, for callers that live in an asyncio event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass

from llama_ray.generation.completion import GenerationError
from llama_ray.generation.engine import Engine, Prompt
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import Delta

_log = logging.getLogger(__name__)

Item = list[Delta] | GenerationError


@dataclass(frozen=True)
class _Stream:
    """Where the deltas of one request go."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Item]


def _deliver(items: list[tuple[_Stream, Item]]) -> None:
    """Put every item into its stream's queue; one wake-up for each event loop, however many of its streams wait."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Item]]] = defaultdict(list)
    for stream, item in items:
        by_loop[stream.loop].append((stream, item))
    for loop, mine in by_loop.items():
        with suppress(RuntimeError):  # that event loop is closed: nobody listens any more
            loop.call_soon_threadsafe(_put, mine)


def _put(items: list[tuple[_Stream, Item]]) -> None:
    for stream, item in items:
        stream.queue.put_nowait(item)


class AsyncEngine:
    """Runs an engine's steps in a thread while there is work; the thread sleeps on a condition while there is none.

    The engine belongs to this object from now on: nobody else may call its `step` or `generate`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._streams: dict[int, _Stream] = {}
        self._wake = threading.Condition()  # also guards _streams and _ended
        self._ended: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncGenerator[Delta]:
        """Deltas of one request, as they come, up to the last one of each of its `n` candidates.

        Whatever is ready at the same moment comes as one delta for each candidate, so a slow reader gets fewer and
        larger ones. Closing the iterator, or cancelling the task that waits for it, aborts the request. The first
        `anext` raises ValueError for a request that cannot be served; GenerationError is raised where the engine
        could not finish it.
        """
        params = params or SamplingParams()
        ids = self.engine.encode(prompt)
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())
        with self._wake:
            if self._ended is not None:
                raise GenerationError(self._ended)
            request_id = self.engine.submit(ids, params)
            self._streams[request_id] = stream
            self._wake.notify()
        open_candidates = params.n
        try:
            while open_candidates:
                for delta in await _ready(stream.queue):
                    if delta.error is not None:
                        raise GenerationError(delta.error)
                    open_candidates -= delta.finish_reason is not None
                    yield delta
        finally:
            if open_candidates:
                self.engine.abort(request_id)
            with self._wake:
                self._streams.pop(request_id, None)

    def stop(self) -> None:
        """End the thread after its present step, and the engine; streams that are open raise GenerationError."""
        self._end("the engine was stopped")
        self._thread.join()
        self.engine.close()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                by_request: dict[int, list[Delta]] = defaultdict(list)
                for delta in self.engine.step():
                    by_request[delta.request_id].append(delta)
                with self._wake:
                    streams = self._streams
                    _deliver([(streams[i], deltas) for i, deltas in by_request.items() if i in streams])
        except Exception as e:  # whoever waits must hear of it, whatever it was
            _log.exception("the engine's thread ends")
            self._end(f"the engine crashed: {type(e).__name__}: {e}")

    def _wait_for_work(self) -> bool:
        """Sleep until a sequence waits or runs (True) or the engine has ended (False)."""
        with self._wake:
            self._wake.wait_for(lambda: self._ended is not None or self.engine.has_work)
            return self._ended is None

    def _end(self, reason: str) -> None:
        with self._wake:
            self._ended = self._ended or reason
            _deliver([(stream, GenerationError(self._ended)) for stream in self._streams.values()])
            self._wake.notify()


async def _ready(queue: asyncio.Queue[Item]) -> list[Delta]:
    """Everything in the queue, at least one item, as one delta for each candidate; raises an item that is an error."""
    items = [await queue.get()]
    while not queue.empty():
        items.append(queue.get_nowait())
    merged: dict[int, Delta] = {}
    for item in items:
        if isinstance(item, GenerationError):
            raise item
        for delta in item:
            merged[delta.index] = merged[delta.index] + delta if delta.index in merged else delta
    return list(merged.values())
