"""An engine for callers in an asyncio event loop."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass

from llama_ray.generation.completion import GenerationError
from llama_ray.generation.engine import Engine, Prompt
from llama_ray.generation.engine_thread import EngineThread, Item
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import Delta


@dataclass(frozen=True)
class _Stream:
    """Receives the deltas of one request."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Item]


class AsyncEngine:
    """Streams the deltas of requests from an engine that runs in a thread of its own.

    From now on the engine belongs to this object: nothing else may call its `step` or `generate`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._thread = EngineThread(engine, _deliver)

    @property
    def ended(self) -> str | None:
        """Why the engine has ended, by a crash or by `stop`; None while it runs."""
        return self._thread.ended

    async def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncGenerator[Delta]:
        """Yield the deltas of one request as they come, up to the last one of each of its `n` candidates.

        Deltas that are ready at the same moment come merged, one for each candidate, so a slow reader gets fewer and
        larger ones. Closing the iterator, or cancelling the task that waits for it, aborts the request. The first
        `anext` raises ValueError for a request that cannot be served; GenerationError is raised if the engine could
        not finish it.
        """
        params = sampling_params or SamplingParams()
        # Encode before `submit` takes the lock that deliveries need.
        ids = self.engine.encode(prompt)
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())
        request_id = self._thread.submit(ids, params, stream)
        unfinished = params.n
        try:
            while unfinished:
                for delta in await _ready(stream.queue):
                    if delta.error is not None:
                        raise GenerationError(delta.error)
                    unfinished -= delta.finish_reason is not None
                    yield delta
        finally:
            if unfinished:
                self._thread.abort(request_id)

    def stop(self) -> None:
        """End the thread after its current step, and close the engine; open streams raise GenerationError."""
        self._thread.stop()


def _deliver(items: list[tuple[_Stream, Item]]) -> None:
    """Put every item into its stream's queue, waking each event loop once for all of its streams."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Item]]] = defaultdict(list)
    for stream, item in items:
        by_loop[stream.loop].append((stream, item))
    for loop, own_items in by_loop.items():
        # RuntimeError: the event loop is closed, and its streams have no reader.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_put, own_items)


def _put(items: list[tuple[_Stream, Item]]) -> None:
    for stream, item in items:
        stream.queue.put_nowait(item)


async def _ready(queue: asyncio.Queue[Item]) -> list[Delta]:
    """Wait for an item; return all that are ready as one delta for each candidate, or raise one that is an error."""
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
