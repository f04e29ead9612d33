"""A model replica, without Ray Serve around it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.generation.completion import GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.options import EngineOptions
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.weight_files import CheckpointError
from llama_ray.pretrained import load_pretrained, save_pretrained
from llama_ray.tracking.errors import TrackingError
from serve_app.replica.replica import LlamaReplica
from serve_app.streams.messages import ChoiceDelta, Event, Failure, GenerationRequest, Started
from tests.data.helpers import BYTE_FALLBACK
from tests.serve_app.helpers import EMOJI, MAX_SEQ_LEN
from tests.small_models import random_model, small_config

LONG = SamplingParams(max_tokens=MAX_SEQ_LEN - 100, ignore_eos=True)
REQUEST = GenerationRequest("tiny", ["The quick"], SamplingParams(max_tokens=20, seed=1), stream=True)


@pytest.fixture
def replica(model_dir: Path) -> Iterator[LlamaReplica]:
    replica = LlamaReplica(str(model_dir), options=EngineOptions(max_num_seqs=4))
    yield replica
    replica.stop()


async def all_events(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


async def idle(replica: LlamaReplica) -> bool:
    stats = await replica.stats()
    return stats.running == stats.waiting == 0


async def check_same_texts(replica: LlamaReplica, request: GenerationRequest, engine: Engine) -> None:
    started, *lists = await all_events(replica.generate(request))
    assert isinstance(started, Started)
    want = engine.generate(request.prompts, request.params)
    texts = [""] * len(want)
    for deltas in lists:
        assert isinstance(deltas, list)
        assert len({delta.index for delta in deltas}) == len(deltas)
        for delta in deltas:
            texts[delta.index] += delta.text
    assert texts == [c.text for c in want]
    assert len(lists) > 1 if request.stream else len(lists) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_prompts_and_candidates_are_answered_as_by_the_engine(
    replica: LlamaReplica, engine: Engine, stream: bool
) -> None:
    params = SamplingParams(max_tokens=20, seed=1, n=3)
    request = GenerationRequest("tiny", ["The quick", engine.encode("dog"), "a"], params, stream=stream)
    asyncio.run(check_same_texts(replica, request, engine))


def test_prompt_lookup_drafts_tokens_and_changes_none(model_dir: Path, engine: Engine) -> None:
    replica = LlamaReplica(str(model_dir), options=EngineOptions(prompt_lookup=True))
    request = GenerationRequest(
        "tiny", [EMOJI * 4, "The quick"], SamplingParams(max_tokens=30, seed=1), stream=True
    )
    asyncio.run(check_same_texts(replica, request, engine))
    assert asyncio.run(replica.stats()).draft_tokens > 0
    replica.stop()


def test_a_slow_reader_gets_what_is_ready_at_once(replica: LlamaReplica) -> None:
    async def read() -> list[Event]:
        events = replica.generate(replace(REQUEST, params=replace(REQUEST.params, max_tokens=50)))
        first = [await anext(events), await anext(events)]
        while not await idle(replica):
            await asyncio.sleep(0)
        return first + await all_events(events)

    _, first, *rest = asyncio.run(read())
    deltas = [delta for event in (first, *rest) if isinstance(event, list) for delta in event]
    assert sum(delta.tokens for delta in deltas) == 50
    assert len(rest) <= 2


def test_closing_the_iterator_frees_the_engine(replica: LlamaReplica) -> None:
    async def leave() -> bool:
        request = replace(REQUEST, prompts=["The quick", "dog"], params=replace(LONG, n=2))
        async with aclosing(replica.generate(request)) as events:
            assert isinstance(await anext(events), Started)
            assert isinstance(await anext(events), list)
        return await idle(replica)

    assert asyncio.run(leave())


def test_cancelling_the_reader_frees_the_engine(replica: LlamaReplica) -> None:
    async def leave() -> bool:
        reader = asyncio.create_task(all_events(replica.generate(replace(REQUEST, params=LONG))))
        while await idle(replica):
            await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        return await idle(replica)

    assert asyncio.run(leave())


def test_nothing_is_tokenised_for_a_client_that_has_left(
    replica: LlamaReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, may_go_on = threading.Event(), threading.Event()
    encoded: list[str] = []

    def encode(tokenizer: Tokenizer, text: str) -> list[int]:
        encoded.append(text)
        started.set()
        may_go_on.wait(30)
        return [1]

    async def leave() -> None:
        reader = asyncio.create_task(all_events(replica.generate(replace(REQUEST, prompts=["a", "b", "c"]))))
        await asyncio.to_thread(started.wait, 30)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        may_go_on.set()

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_prompt", encode)
        asyncio.run(leave())
    # Prompts of one length are tokenised in turn.
    asyncio.run(all_events(replica.generate(REQUEST)))
    assert encoded == ["a"]


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (replace(REQUEST, model="other"), 404, "model 'other' is not served here; ask for 'tiny'"),
        (replace(REQUEST, prompts=["\ud800"]), 400, "lone surrogate"),
        (replace(REQUEST, prompts=["a b" * 10**6]), 400, "the prompt has 3,000,000 bytes, which are"),
        (replace(REQUEST, prompts=["a", [70_000]], params=LONG), 400, "token id 70000 is outside"),
    ],
)
def test_a_request_that_cannot_be_served_is_one_failure_and_leaves_nothing_running(
    replica: LlamaReplica, request_: GenerationRequest, status: int, message: str
) -> None:
    async def ask() -> tuple[list[Event], bool]:
        return await all_events(replica.generate(request_)), await idle(replica)

    [failure], freed = asyncio.run(ask())
    assert isinstance(failure, Failure)
    assert failure.status == status
    assert message in failure.message
    assert freed


def test_a_dead_engine_fails_the_request_and_the_health_check(replica: LlamaReplica) -> None:
    async def die() -> list[Event]:
        await replica.check_health()
        events = replica.generate(replace(REQUEST, params=LONG))
        first = await anext(events)
        await asyncio.to_thread(replica._engine.stop)
        return [first, *await all_events(events)]

    started, *_, failure = asyncio.run(die())
    assert isinstance(started, Started)
    assert isinstance(failure, Failure)
    assert failure.status == 500
    with pytest.raises(GenerationError):
        asyncio.run(replica.check_health())
    with pytest.raises(GenerationError):
        asyncio.run(replica.info())


def test_deltas_of_one_choice_join() -> None:
    parts = [ChoiceDelta(3, "a", 1), ChoiceDelta(3, "", 2), ChoiceDelta(3, "b", 1, None, "stop")]
    assert ChoiceDelta.joined(parts) == ChoiceDelta(3, "ab", 4, None, "stop")


def test_a_model_that_cannot_be_served_is_refused_with_the_reason(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        LlamaReplica(str(tmp_path / "nowhere"))
    with pytest.raises(TrackingError, match="ftp://host is not a tracking URI"):
        LlamaReplica("models:/absent@champion", "ftp://host")
    model, _ = load_pretrained(model_dir)
    save_pretrained(model, None, tmp_path / "mute")
    with pytest.raises(ValueError, match="has no tokenizer"):
        LlamaReplica(str(tmp_path / "mute"))


@pytest.mark.parametrize("stream", [True, False])
def test_choices_continue_their_prompts_where_a_tokens_text_depends_on_what_is_before_it(
    tmp_path: Path, stream: bool
) -> None:
    save_pretrained(random_model(small_config(BYTE_FALLBACK.vocab_size)), BYTE_FALLBACK, tmp_path)
    words = BYTE_FALLBACK.encode("the ab a he t")
    params = SamplingParams(
        max_tokens=12, seed=4, n=2, logprobs=0, logit_bias=dict.fromkeys(words, 100.0), ignore_eos=True
    )
    prompts: list[str | list[int]] = ["the ab", BYTE_FALLBACK.encode("a b")]
    request = GenerationRequest(tmp_path.name, prompts, params, stream=stream)
    replica = LlamaReplica(str(tmp_path))
    _, *lists = asyncio.run(all_events(replica.generate(request)))
    replica.stop()
    deltas = [delta for event in lists if isinstance(event, list) for delta in event]
    want = Engine.from_pretrained(tmp_path, device="cpu").generate(prompts, params)
    for index, completion in enumerate(want):
        choice = ChoiceDelta.joined([delta for delta in deltas if delta.index == index])
        whole = BYTE_FALLBACK.decode(completion.prompt_token_ids + completion.token_ids)
        assert BYTE_FALLBACK.decode(completion.prompt_token_ids) + choice.text == whole
        assert choice.logprobs is not None
        assert "".join(choice.logprobs.tokens) == choice.text
    assert any(completion.text.startswith(" ") for completion in want)
