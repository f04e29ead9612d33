"""An engine for callers in an asyncio event loop."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from llama_ray.generation.completion import GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.engine_thread import EngineThread, Item
from llama_ray.generation.request import Prompt, Request
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import Delta

PromptDelta = tuple[int, Delta]
"""(number of the prompt, what was added to one of its candidates)."""


@dataclass(frozen=True)
class _Receiver:
    """Receives the deltas of prompt `number` of a request."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[tuple[int, Item]]
    number: int


MAX_COMPILING_REQUESTS = 256
"""Requests that wait for their grammar at once; others wait for one of them."""


class AsyncEngine:
    """Streams the deltas of requests from an engine that runs in a thread of its own.

    From now on the engine belongs to this object: nothing else may call its `step` or `generate`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._thread = EngineThread(engine, _deliver)
        # Not the event loop's own threads, which a few costly grammars would occupy.
        self._compiling = ThreadPoolExecutor(MAX_COMPILING_REQUESTS, "grammar")

    @property
    def ended(self) -> str | None:
        """Why the engine has ended, by a crash or by `stop`; None while it runs."""
        return self._thread.ended

    @asynccontextmanager
    async def submit(
        self, prompts: Sequence[Prompt], sampling_params: SamplingParams
    ) -> AsyncIterator[AsyncIterator[list[PromptDelta]]]:
        """Queue a request for each prompt; give an iterator over lists of deltas, at most one for each candidate.

        What is ready at the same moment comes together, so a slow reader gets fewer and larger deltas; nothing waits
        for more. A grammar is compiled while the event loop goes on. Entering raises ValueError for a prompt that
        cannot be served, and GenerationError if the engine has ended. Iterating raises GenerationError if the
        engine could not finish one. Leaving aborts what is unfinished.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Item]]()
        request_ids: list[int] = []
        try:
            for number, request in enumerate(await self._prepare(prompts, sampling_params)):
                request_ids.append(self._thread.add(request, _Receiver(loop, queue, number)))
            yield _batches(queue, len(prompts) * sampling_params.n)
        finally:
            for request_id in request_ids:
                self._thread.abort(request_id)

    async def _prepare(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Request]:
        def prepare() -> list[Request]:
            return [self.engine.prepare(prompt, params) for prompt in prompts]

        if not params.constrained:
            return prepare()
        return await asyncio.get_running_loop().run_in_executor(self._compiling, prepare)

    async def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncGenerator[Delta]:
        """Yield the deltas of one prompt as they come, up to the last one of each of its `n` candidates.

        Closing the iterator, or cancelling the task that waits for it, aborts the request. The first `anext` raises
        ValueError for a request that cannot be served; GenerationError is raised if the engine could not finish it.
        """
        async with self.submit([prompt], sampling_params or SamplingParams()) as batches:
            async for batch in batches:
                for _, delta in batch:
                    yield delta

    def stop(self) -> None:
        """End the thread after its current step, and close the engine; open streams raise GenerationError."""
        self._thread.stop()
        self._compiling.shutdown(wait=False, cancel_futures=True)


def _deliver(items: list[tuple[_Receiver, Item]]) -> None:
    """Put every item into its receiver's queue, waking each event loop once for all of its receivers."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Receiver, Item]]] = defaultdict(list)
    for receiver, item in items:
        by_loop[receiver.loop].append((receiver, item))
    for loop, own_items in by_loop.items():
        # RuntimeError: the event loop is closed, and its queues have no reader.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_put, own_items)


def _put(items: list[tuple[_Receiver, Item]]) -> None:
    for receiver, item in items:
        receiver.queue.put_nowait((receiver.number, item))


async def _batches(
    queue: asyncio.Queue[tuple[int, Item]], unfinished: int
) -> AsyncIterator[list[PromptDelta]]:
    """Yield what is ready until `unfinished` candidates have ended."""
    while unfinished:
        batch = await _ready(queue)
        for _, delta in batch:
            if delta.error is not None:
                raise GenerationError(delta.error)
            unfinished -= delta.finish_reason is not None
        yield batch


async def _ready(queue: asyncio.Queue[tuple[int, Item]]) -> list[PromptDelta]:
    """Wait for an item; return all that are ready as one delta for each candidate, or raise one that is an error."""
    items = [await queue.get()]
    while not queue.empty():
        items.append(queue.get_nowait())
    merged: dict[tuple[int, int], Delta] = {}
    for number, item in items:
        if isinstance(item, GenerationError):
            raise item
        for delta in item:
            key = (number, delta.index)
            merged[key] = merged[key] + delta if key in merged else delta
    return [(number, delta) for (number, _), delta in merged.items()]
