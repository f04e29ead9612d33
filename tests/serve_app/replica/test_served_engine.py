"""One engine that answers submissions, whose events arrive over a real connection."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.engine import Engine
from llama_ray.generation.engine_thread import EngineThread
from llama_ray.generation.request import Request
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.pretrained import save_pretrained
from serve_app.registry.messages import ModelVersion
from serve_app.replica.logprobs import LogprobWriter
from serve_app.replica.served_engine import ServedEngine
from serve_app.streams.frames import Wire
from serve_app.streams.messages import (
    Address,
    Answered,
    ChoiceDelta,
    Event,
    Failure,
    Reporting,
    Started,
    Submission,
)
from serve_app.streams.receiver import Receiver, Stream
from serve_app.streams.sender import Connection, Sender
from tests.data.helpers import BYTE_FALLBACK
from tests.serve_app.helpers import EMOJI, MAX_SEQ_LEN
from tests.small_models import random_model, small_config

LONG = SamplingParams(max_tokens=MAX_SEQ_LEN - 100, ignore_eos=True)
SUBMISSION = Submission("tiny", ["The quick"], SamplingParams(max_tokens=20, seed=1), Address("", 0, b""), 0)


def serve(directory: Path, **options: object) -> ServedEngine:
    engine = Engine.from_pretrained(directory, device="cpu", **options)
    return ServedEngine(engine, ModelVersion("tiny", "tiny", str(directory)))


@pytest.fixture
def served(model_dir: Path) -> Iterator[ServedEngine]:
    served = serve(model_dir, max_num_seqs=4)
    yield served
    served.stop()


class Asked:
    """A submission on its way to an engine: what came of it so far, and how its call ended."""

    def __init__(self, stream: Stream, call: asyncio.Task[Answered], choices: int) -> None:
        self.stream, self.call = stream, call
        self._unfinished = choices

    async def next(self) -> list[Event]:
        """Wait for events, and return all that have come."""
        events = await self.stream.next()
        for event in events:
            if isinstance(event, Failure):
                self._unfinished = 0
            elif isinstance(event, list):
                self._unfinished -= sum(delta.finish_reason is not None for delta in event)
        return events

    async def rest(self) -> list[Event]:
        """Return what comes up to the end."""
        events = list[Event]()
        while self._unfinished:
            events += await self.next()
        return events


Ask = Callable[[Submission], Awaitable[Asked]]


def with_ask(served: ServedEngine, test: Callable[[Ask], Awaitable[None]]) -> None:
    """Run `test` with a function that submits to `served`."""

    async def run() -> None:
        receiver, sender = await Receiver.listen("127.0.0.1"), Sender()

        async def ask(submission: Submission) -> Asked:
            stream = receiver.open()
            submission = replace(submission, reply_to=receiver.address, stream=stream.number)
            connection = await sender.connect(receiver.address)
            call = asyncio.create_task(served.answer(submission, connection))
            return Asked(stream, call, len(submission.prompts) * submission.params.n)

        try:
            async with asyncio.timeout(60):
                await test(ask)
        finally:
            receiver.close()
            sender.close()

    asyncio.run(run())


def answer(served: ServedEngine, submission: Submission) -> list[Event]:
    """Return all events of one submission."""
    found = list[Event]()

    async def test(ask: Ask) -> None:
        asked = await ask(submission)
        found.extend(await asked.rest())
        assert await asked.call == "done"

    with_ask(served, test)
    return found


async def until_idle(served: ServedEngine) -> None:
    while served.engine.stats.running or served.engine.stats.waiting or served.open_requests:
        await asyncio.sleep(0)


def texts(events: list[Event]) -> list[str]:
    deltas = [delta for event in events if isinstance(event, list) for delta in event]
    return [
        "".join(delta.text for delta in deltas if delta.index == index)
        for index in range(1 + max(delta.index for delta in deltas))
    ]


def test_a_stream_begins_with_its_start_however_soon_the_first_token_comes(
    served: ServedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a busy machine: the event loop does not go on before the engine's thread has sent a token."""
    loop, token_sent = threading.current_thread(), threading.Event()
    add, send = EngineThread.add, Connection.send

    def add_and_wait(self: EngineThread[Any], request: Request, receiver: Any) -> int:
        request_id = add(self, request, receiver)
        assert token_sent.wait(60)
        return request_id

    def send_and_tell(self: Connection, messages: list[Wire]) -> None:
        send(self, messages)
        if threading.current_thread() is not loop:
            token_sent.set()

    monkeypatch.setattr(EngineThread, "add", add_and_wait)
    monkeypatch.setattr(Connection, "send", send_and_tell)

    async def test(ask: Ask) -> None:
        asked = await ask(SUBMISSION)
        first, *_ = await asked.rest()
        assert isinstance(first, Started)

    with_ask(served, test)


def test_prompts_and_candidates_are_answered_as_by_the_engine(served: ServedEngine, engine: Engine) -> None:
    params = SamplingParams(max_tokens=20, seed=1, n=3)
    prompts: list[str | list[int]] = ["The quick", engine.encode("dog"), "a"]
    started, *lists = answer(
        served, replace(SUBMISSION, prompts=prompts, params=params, reporting=Reporting(echo=True))
    )
    want = engine.generate(prompts, params)
    assert started == Started(
        "tiny", sum(len(c.prompt_token_ids) for c in want[::3]), ["The quick", "dog", "a"]
    )
    assert texts(lists) == [c.text for c in want]
    assert len(lists) > 1


def test_prompt_lookup_drafts_tokens_and_changes_none(model_dir: Path, engine: Engine) -> None:
    served = serve(model_dir, prompt_lookup=True)
    prompts: list[str | list[int]] = [EMOJI * 4, "The quick"]
    params = SamplingParams(max_tokens=30, seed=1)
    events = answer(served, replace(SUBMISSION, prompts=prompts, params=params))
    assert texts(events) == [c.text for c in engine.generate(prompts, params)]
    assert served.engine.stats.draft_tokens > 0
    served.stop()


def test_what_the_steps_gave_while_the_loop_was_busy_comes_together(served: ServedEngine) -> None:
    async def test(ask: Ask) -> None:
        asked = await ask(replace(SUBMISSION, params=replace(SUBMISSION.params, max_tokens=50)))
        first = await asked.next()
        assert isinstance(first[0], Started)
        while served.engine.stats.running or served.engine.stats.waiting:
            pass  # The event loop does nothing meanwhile.
        events = first + await asked.rest()
        deltas = [delta for event in events if isinstance(event, list) for delta in event]
        assert sum(len(delta.token_ids) for delta in deltas) == 50

    with_ask(served, test)


@pytest.mark.parametrize("way", ["close", "cancel"])
def test_whoever_leaves_frees_the_engine(served: ServedEngine, way: str) -> None:
    async def test(ask: Ask) -> None:
        asked = await ask(replace(SUBMISSION, prompts=["The quick", "dog"], params=replace(LONG, n=2)))
        while len(await asked.next()) < 2:
            pass
        if way == "close":
            asked.stream.close()
            assert await asked.call == "done"
        else:
            asked.call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked.call
        await until_idle(served)
        assert served.engine.stats.generated_tokens < 4 * LONG.max_tokens

    with_ask(served, test)


def test_nothing_is_tokenised_for_a_client_that_has_left(
    served: ServedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, may_go_on = threading.Event(), threading.Event()
    encoded: list[str] = []

    def encode(tokenizer: Tokenizer, text: str, **options: bool) -> list[int]:
        encoded.append(text)
        began.set()
        may_go_on.wait(30)
        return [1]

    async def test(ask: Ask) -> None:
        asked = await ask(replace(SUBMISSION, prompts=["a", "b", "c"]))
        await asyncio.to_thread(began.wait, 30)
        asked.call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked.call
        may_go_on.set()

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_prompt", encode)
        with_ask(served, test)
    # Prompts of one length are tokenised in turn.
    answer(served, SUBMISSION)
    assert encoded == ["a"]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"prompts": ["\ud800"]}, 400, "lone surrogate"),
        ({"prompts": ["a b" * 10**6]}, 400, "the prompt has 3,000,000 bytes, which are"),
        ({"prompts": ["a", [70_000]], "params": LONG}, 400, "token id 70000 is outside"),
        ({"done": {0: [70_000]}}, 400, "70000"),
    ],
)
def test_a_request_that_cannot_be_served_is_one_failure_and_leaves_nothing_running(
    served: ServedEngine, change: dict[str, object], status: int, message: str
) -> None:
    [failure] = answer(served, replace(SUBMISSION, **change))  # type: ignore[arg-type]
    assert isinstance(failure, Failure)
    assert failure.status == status
    assert message in failure.message
    asyncio.run(until_idle(served))


def test_a_dead_engine_ends_the_call_without_a_failure_so_that_another_one_goes_on(
    served: ServedEngine,
) -> None:
    async def test(ask: Ask) -> None:
        asked = await ask(replace(SUBMISSION, params=LONG))
        await asked.next()
        await asyncio.to_thread(served.stop)
        assert await asked.call == "engine_ended"
        assert await (await ask(SUBMISSION)).call == "engine_ended"

    with_ask(served, test)
    assert served.ended == "the engine was stopped"


def test_a_panic_while_an_answer_is_written_ends_that_answer_alone(
    served: ServedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panicked(BaseException):
        """As pyo3's PanicException, which is no Exception either."""

    def panic(*arguments: object) -> None:
        raise Panicked("index out of bounds")

    async def test(ask: Ask) -> None:
        other = await ask(replace(SUBMISSION, params=replace(LONG, max_tokens=300)))
        asked = await ask(replace(SUBMISSION, params=replace(SUBMISSION.params, logprobs=1)))
        *_, failure = await asked.rest()
        assert isinstance(failure, Failure)
        assert failure.status == 500
        assert await asked.call == "done"
        assert len("".join(texts((await other.rest())[1:]))) > 100

    monkeypatch.setattr(LogprobWriter, "write", panic)
    with_ask(served, test)


def test_deltas_of_one_choice_join() -> None:
    parts = [ChoiceDelta(3, "a", [1]), ChoiceDelta(3, "", [2, 3]), ChoiceDelta(3, "b", [4], None, "stop")]
    assert ChoiceDelta.joined(parts) == ChoiceDelta(3, "ab", [1, 2, 3, 4], None, "stop")


def test_choices_continue_their_prompts_where_a_tokens_text_depends_on_what_is_before_it(
    tmp_path: Path,
) -> None:
    save_pretrained(random_model(small_config(BYTE_FALLBACK.vocab_size)), BYTE_FALLBACK, tmp_path)
    words = BYTE_FALLBACK.encode("the ab a he t")
    params = SamplingParams(
        max_tokens=12, seed=4, n=2, logprobs=0, logit_bias=dict.fromkeys(words, 100.0), ignore_eos=True
    )
    prompts: list[str | list[int]] = ["the ab", BYTE_FALLBACK.encode("a b")]
    served = serve(tmp_path)
    _, *lists = answer(served, replace(SUBMISSION, prompts=prompts, params=params))
    served.stop()
    deltas = [delta for event in lists if isinstance(event, list) for delta in event]
    want = Engine.from_pretrained(tmp_path, device="cpu").generate(prompts, params)
    for index, completion in enumerate(want):
        choice = ChoiceDelta.joined([delta for delta in deltas if delta.index == index])
        whole = BYTE_FALLBACK.decode(completion.prompt_token_ids + completion.token_ids)
        assert BYTE_FALLBACK.decode(completion.prompt_token_ids) + choice.text == whole
        assert choice.logprobs is not None
        assert "".join(choice.logprobs.tokens) == choice.text
    assert any(completion.text.startswith(" ") for completion in want)
