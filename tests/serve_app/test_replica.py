"""A model replica, without Ray Serve around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from llama_ray.generation.completion import GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.options import EngineOptions
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.checkpoint import CheckpointError
from llama_ray.pretrained import load_pretrained, save_pretrained
from llama_ray.tracking.uri import TrackingError
from serve_app.events import Event, Failure, Job, Piece, Started
from serve_app.replica import LlamaReplica
from tests.serve_app.conftest import EMOJI, MAX_SEQ_LEN

LONG = SamplingParams(max_tokens=MAX_SEQ_LEN - 100, ignore_eos=True)
JOB = Job("tiny", ["The quick"], SamplingParams(max_tokens=20, seed=1), stream=True)


@pytest.fixture
def replica(model_dir: Path) -> Iterator[LlamaReplica]:
    replica = LlamaReplica(str(model_dir), options=EngineOptions(max_num_seqs=4))
    yield replica
    replica._engine.stop()


async def all_of(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


async def idle(replica: LlamaReplica) -> bool:
    stats = await replica.stats()
    return stats.running == stats.waiting == 0


async def compare(replica: LlamaReplica, job: Job, engine: Engine) -> None:
    started, *lists = await all_of(replica.generate(job))
    assert isinstance(started, Started)
    want = engine.generate(job.prompts, job.params)
    texts = [""] * len(want)
    for pieces in lists:
        assert isinstance(pieces, list)
        assert len({p.index for p in pieces}) == len(pieces)
        for piece in pieces:
            texts[piece.index] += piece.text
    assert texts == [c.text for c in want]
    assert len(lists) > 1 if job.stream else len(lists) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_prompts_and_candidates_come_as_the_engine_gives_them(
    replica: LlamaReplica, engine: Engine, stream: bool
) -> None:
    params = SamplingParams(max_tokens=20, seed=1, n=3)
    job = Job("tiny", ["The quick", engine.encode("dog"), "a"], params, stream=stream)
    asyncio.run(compare(replica, job, engine))


def test_guesses_change_nothing(model_dir: Path, engine: Engine) -> None:
    replica = LlamaReplica(str(model_dir), options=EngineOptions(prompt_lookup=True))
    job = Job("tiny", [EMOJI * 4, "The quick"], SamplingParams(max_tokens=30, seed=1), stream=True)
    asyncio.run(compare(replica, job, engine))
    assert asyncio.run(replica.stats()).draft_tokens > 0
    replica._engine.stop()


def test_a_slow_reader_gets_what_is_ready_at_once(replica: LlamaReplica) -> None:
    async def read() -> list[Event]:
        events = replica.generate(replace(JOB, params=replace(JOB.params, max_tokens=50)))
        first = [await anext(events), await anext(events)]
        while not await idle(replica):
            await asyncio.sleep(0)
        return first + await all_of(events)

    _, first, *rest = asyncio.run(read())
    pieces = [p for event in (first, *rest) if isinstance(event, list) for p in event]
    assert sum(p.tokens for p in pieces) == 50
    assert len(rest) <= 2


def test_closing_the_iterator_frees_the_engine(replica: LlamaReplica) -> None:
    async def leave() -> bool:
        job = replace(JOB, prompts=["The quick", "dog"], params=replace(LONG, n=2))
        async with aclosing(replica.generate(job)) as events:
            assert isinstance(await anext(events), Started)
            assert isinstance(await anext(events), list)
        return await idle(replica)

    assert asyncio.run(leave())


def test_cancelling_the_reader_frees_the_engine(replica: LlamaReplica) -> None:
    async def leave() -> bool:
        reader = asyncio.create_task(all_of(replica.generate(replace(JOB, params=LONG))))
        while await idle(replica):
            await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        return await idle(replica)

    assert asyncio.run(leave())


@pytest.mark.parametrize(
    ("job", "status", "message"),
    [
        (replace(JOB, model="other"), 404, "model 'other' is not served here; ask for 'tiny'"),
        (replace(JOB, prompts=["\ud800"]), 400, "lone surrogate"),
        (replace(JOB, prompts=["a", [70_000]], params=LONG), 400, "token id 70000 is outside"),
    ],
)
def test_a_job_that_cannot_be_served_is_one_failure_and_leaves_nothing(
    replica: LlamaReplica, job: Job, status: int, message: str
) -> None:
    async def ask() -> tuple[list[Event], bool]:
        return await all_of(replica.generate(job)), await idle(replica)

    [failure], freed = asyncio.run(ask())
    assert isinstance(failure, Failure)
    assert failure.status == status
    assert message in failure.message
    assert freed


def test_a_dead_engine_fails_the_job_and_the_health_check(replica: LlamaReplica) -> None:
    async def die() -> list[Event]:
        await replica.check_health()
        events = replica.generate(replace(JOB, params=LONG))
        first = await anext(events)
        await asyncio.to_thread(replica._engine.stop)
        return [first, *await all_of(events)]

    started, *_, failure = asyncio.run(die())
    assert isinstance(started, Started)
    assert isinstance(failure, Failure)
    assert failure.status == 500
    with pytest.raises(GenerationError):
        asyncio.run(replica.check_health())
    with pytest.raises(GenerationError):
        asyncio.run(replica.info())


def test_pieces_join() -> None:
    joined = Piece.joined([Piece(3, "a", 1), Piece(3, "", 2), Piece(3, "b", 1, None, "stop")])
    assert joined == Piece(3, "ab", 4, None, "stop")


def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        LlamaReplica(str(tmp_path / "nowhere"))
    with pytest.raises(TrackingError, match="ftp://host is none that MLflow can track to"):
        LlamaReplica("models:/absent@champion", "ftp://host")
    model, _ = load_pretrained(model_dir)
    save_pretrained(model, None, tmp_path / "mute")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        LlamaReplica(str(tmp_path / "mute"))
