from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from contextlib import aclosing

import pytest
import torch

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.generation.async_engine import AsyncEngine
from llama_ray.generation.completion import GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.request import Prompt
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import Delta
from llama_ray.model.llama import Llama

PROMPTS = ["def", "The quick brown fox", "Zwölf Box", "a"]
PARAMS = SamplingParams(max_tokens=20, seed=3, ignore_eos=True, logprobs=1)
LONG = SamplingParams(max_tokens=150, ignore_eos=True)


@pytest.fixture
def running(model: Llama, tokenizer: Tokenizer) -> Iterator[AsyncEngine]:
    running = AsyncEngine(Engine(model, tokenizer, max_num_seqs=2))
    yield running
    running.stop()


async def collect(running: AsyncEngine, prompt: Prompt, params: SamplingParams) -> dict[int, Delta]:
    merged: dict[int, Delta] = {}
    async for delta in running.stream(prompt, params):
        merged[delta.index] = merged[delta.index] + delta if delta.index in merged else delta
    return merged


async def until_idle(running: AsyncEngine) -> None:
    while running.engine.has_work:
        await asyncio.sleep(0)


def test_concurrent_streams_equal_generate(running: AsyncEngine, model: Llama, tokenizer: Tokenizer) -> None:
    params = dataclasses.replace(PARAMS, n=2)
    expected = iter(Engine(model, tokenizer).generate(PROMPTS, params))

    async def all_at_once() -> list[dict[int, Delta]]:
        return await asyncio.gather(*(collect(running, p, params) for p in PROMPTS))

    for candidates in asyncio.run(all_at_once()):
        for index in range(2):
            got, completion = candidates[index], next(expected)
            assert (got.text, got.token_ids, got.finish_reason) == (
                completion.text,
                completion.token_ids,
                completion.finish_reason,
            )
            assert got.logprobs is not None
            assert [r.token_id for r in got.logprobs] == got.token_ids


def test_an_idle_engine_wakes_for_the_next_request(running: AsyncEngine) -> None:
    async def twice() -> tuple[dict[int, Delta], dict[int, Delta]]:
        first = await collect(running, "a", PARAMS)
        await until_idle(running)
        return first, await collect(running, "a", PARAMS)

    first, second = asyncio.run(asyncio.wait_for(twice(), 30))
    assert [d.token_ids for d in first.values()] == [d.token_ids for d in second.values()]


def test_a_cancelled_consumer_frees_the_engine(running: AsyncEngine) -> None:
    async def cancel_one() -> dict[int, Delta]:
        started = asyncio.Event()

        async def consume() -> None:
            async for _ in running.stream("a", LONG):
                started.set()

        task = asyncio.create_task(consume())
        await started.wait()
        assert running.engine.stats.running == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert running.engine.stats.running == 0
        return await collect(running, "a", PARAMS)

    assert len(asyncio.run(cancel_one())[0].token_ids) == 20
    assert running.engine.stats.generated_tokens < 150


def test_closing_the_iterator_frees_the_engine(running: AsyncEngine) -> None:
    async def close_early() -> None:
        async with aclosing(running.stream("a", LONG)) as deltas:
            async for _ in deltas:
                break
        assert running.engine.stats.running == 0

    asyncio.run(close_early())


def test_a_slow_reader_gets_all_tokens_in_fewer_deltas(running: AsyncEngine) -> None:
    async def read_late() -> list[Delta]:
        deltas = running.stream("a", PARAMS)
        got = [await anext(deltas)]
        await until_idle(running)
        return [*got, *[d async for d in deltas]]

    got = asyncio.run(read_late())
    assert len(got) <= 3
    assert sum(len(d.token_ids) for d in got) == 20
    assert got[-1].finish_reason == "length"


def test_a_bad_request_raises_at_once_and_others_continue(running: AsyncEngine) -> None:
    async def both() -> dict[int, Delta]:
        good = asyncio.create_task(collect(running, "a", PARAMS))
        with pytest.raises(ValueError, match="the prompt is empty"):
            await anext(running.stream([], PARAMS))
        return await good

    assert len(asyncio.run(both())[0].token_ids) == 20


def test_a_failing_model_fails_open_streams_and_not_later_ones(model: Llama) -> None:
    doomed = Llama(model.config)
    running = AsyncEngine(Engine(doomed, None, max_num_seqs=2))
    whole = doomed.lm_head.weight

    async def crash() -> None:
        # The last one waits.
        streams = [asyncio.create_task(collect(running, [1], LONG)) for _ in range(3)]
        while running.engine.stats.running < 2:
            await asyncio.sleep(0)
        doomed.lm_head.weight = torch.nn.Parameter(torch.zeros(1, 1))
        for outcome in await asyncio.gather(*streams, return_exceptions=True):
            assert isinstance(outcome, GenerationError)
            assert str(outcome).startswith("RuntimeError: mat1 and mat2")
        doomed.lm_head.weight = whole
        assert len((await collect(running, [1], PARAMS))[0].token_ids) == PARAMS.max_tokens

    asyncio.run(asyncio.wait_for(crash(), 30))
    running.stop()


def test_stop_ends_open_streams_with_the_reason(running: AsyncEngine) -> None:
    async def stop() -> None:
        deltas = running.stream("a", LONG)
        await anext(deltas)
        assert running.ended is None
        running.stop()
        assert running.ended == "the engine was stopped"
        with pytest.raises(GenerationError, match="the engine was stopped"):
            await anext(d async for d in deltas if d.finish_reason)

    asyncio.run(stop())
