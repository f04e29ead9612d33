"""The streams of a request's prompts, merged into one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager

from llama_ray.generation.async_engine import AsyncEngine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import Delta

PromptDelta = tuple[int, Delta]
"""(number of the prompt, what was added to one of its candidates)."""
_Queue = asyncio.Queue[PromptDelta | Exception]


@asynccontextmanager
async def merged_streams(
    engine: AsyncEngine, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> AsyncIterator[AsyncIterator[list[PromptDelta]]]:
    """Submit all prompts, and give an iterator over lists of deltas, at most one of each candidate.

    Deltas that are ready at the same moment come together, and nothing waits for more. Entering raises ValueError for
    a prompt that the engine refuses; iterating raises what the first stream to fail raises. Leaving aborts what is
    unfinished.
    """
    queue: _Queue = asyncio.Queue()
    tasks = [asyncio.create_task(_forward(engine, i, ids, params, queue)) for i, ids in enumerate(prompts)]
    try:
        # Each task runs up to its first wait before this one continues, and has submitted its prompt by then: a refusal
        # is known before anything is answered.
        await asyncio.sleep(0)
        yield _batches(queue, _drain(queue), len(prompts) * params.n)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(
    engine: AsyncEngine, number: int, ids: Sequence[int], params: SamplingParams, queue: _Queue
) -> None:
    try:
        async with aclosing(engine.stream(ids, params)) as deltas:
            async for delta in deltas:
                queue.put_nowait((number, delta))
    except Exception as error:  # Raised again where the queue is read.
        queue.put_nowait(error)


async def _batches(
    queue: _Queue, first: list[PromptDelta], unfinished: int
) -> AsyncIterator[list[PromptDelta]]:
    ready = first
    while unfinished:
        batch = _merge(ready or [_checked(await queue.get()), *_drain(queue)])
        ready = []
        unfinished -= sum(delta.finish_reason is not None for _, delta in batch)
        yield batch


def _drain(queue: _Queue) -> list[PromptDelta]:
    """Return what is in the queue now. Raises an item that is an exception."""
    return [_checked(queue.get_nowait()) for _ in range(queue.qsize())]


def _checked(item: PromptDelta | Exception) -> PromptDelta:
    if isinstance(item, Exception):
        raise item
    return item


def _merge(items: Iterable[PromptDelta]) -> list[PromptDelta]:
    """Join the deltas of each candidate, of which a slow reader finds several."""
    merged: dict[tuple[int, int], Delta] = {}
    for number, delta in items:
        key = (number, delta.index)
        merged[key] = merged[key] + delta if key in merged else delta
    return [(number, delta) for (number, _), delta in merged.items()]
