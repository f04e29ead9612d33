"""Requests through real connections to engines in this process, some of which are lost in the middle."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from llama_ray.data.chat.template import ChatPrompt
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from serve_app.errors import ApiError
from serve_app.protocol.generation import GenerationRequest
from serve_app.registry.messages import AdapterVersion, ApiReport
from serve_app.routing.client import Accepted, RoutedClient
from serve_app.streams.frames import to_wire
from serve_app.streams.messages import Answered, ChoiceDelta, Encoding, Reporting, Started, Submission
from serve_app.streams.questions import Describe, Question, Reply
from serve_app.streams.receiver import Lost
from serve_app.streams.sender import Sender
from tests.serve_app.helpers import EMOJI, MAX_SEQ_LEN, FixedFollower, LocalReplicas, local_client, table_of

LONG = SamplingParams(max_tokens=MAX_SEQ_LEN - 100, ignore_eos=True)


@pytest.fixture
def replicas(model_dir: Path) -> Iterator[LocalReplicas]:
    replicas = LocalReplicas(model_dir, 2, max_num_seqs=8)
    yield replicas
    replicas.stop()


@pytest.fixture
def follower(model_dir: Path, adapter_dirs: dict[str, Path]) -> FixedFollower:
    table = table_of(model_dir)
    adapters = tuple(AdapterVersion(name, str(directory)) for name, directory in adapter_dirs.items())
    return FixedFollower(replace(table, models=(replace(table.models[0], adapters=adapters),)))


@pytest.fixture(scope="module")
def adapted(model_dir: Path, adapter_dirs: dict[str, Path]) -> Engine:
    """The served model and an adapter in this process: the reference for what replicas answer."""
    return Engine.from_pretrained(model_dir, device="cpu", adapters={"quiet": adapter_dirs["quiet"]})


async def read(
    client: RoutedClient, request: GenerationRequest, on_tokens: Callable[[int], None] = lambda tokens: None
) -> list[ChoiceDelta]:
    """Return what each choice got, in order; `on_tokens` hears of the number of tokens after each event."""
    parts: dict[int, list[ChoiceDelta]] = {}
    events = client.generate(request)
    assert isinstance(await anext(events), Accepted)
    async for event in events:
        assert isinstance(event, list)
        assert len({delta.index for delta in event}) == len(event)
        for delta in event:
            parts.setdefault(delta.index, []).append(delta)
        on_tokens(sum(len(delta.token_ids) for deltas in parts.values() for delta in deltas))
    return [ChoiceDelta.joined(parts[index]) for index in sorted(parts)]


def lose_at(replicas: LocalReplicas, moments: list[int]) -> Callable[[int], None]:
    """Return a function that loses the replica when the number of tokens passes each moment."""
    left = list(moments)

    def on_tokens(tokens: int) -> None:
        if left and tokens >= left[0]:
            left.pop(0)
            replicas.lose()

    return on_tokens


ECHO = Reporting(echo=True)
CASES = [
    GenerationRequest("tiny", ["The quick"], SamplingParams(max_tokens=120, seed=1, logprobs=2)),
    GenerationRequest(
        "tiny",
        [EMOJI],
        SamplingParams(max_tokens=119, temperature=0, logprobs=0),
        reporting=ECHO,
    ),
    GenerationRequest("tiny", ["dog", [5, 6, 7]], SamplingParams(max_tokens=60, seed=3, n=2), reporting=ECHO),
    GenerationRequest(
        "tiny", ["def add("], SamplingParams(max_tokens=90, seed=4, stop=("zz", "qu"), frequency_penalty=0.5)
    ),
    GenerationRequest(
        "tiny", ["a"], SamplingParams(max_tokens=100, seed=5, regex="[a-z ]{60,80}", min_tokens=10)
    ),
    GenerationRequest(
        "tiny",
        [ChatPrompt([{"role": "user", "content": "dog"}], now="2026-01-01T00:00:00")],
        SamplingParams(max_tokens=100, seed=6, stop=("\nUser:",)),
    ),
    GenerationRequest(
        "tiny",
        ["The quick", [5, 6, 7]],
        SamplingParams(max_tokens=70, seed=6, n=2, logprobs=1, prompt_logprobs=3, bad_words=("a", "the")),
        reporting=Reporting(echo=True, prompt_ids=True, prompt_logprobs=3, names="ids"),
    ),
    GenerationRequest(
        "tiny",
        ["<|end_of_text|> dog"],
        SamplingParams(
            max_tokens=200,
            seed=2,
            stop=("?", "x"),
            include_stop_str_in_output=True,
            min_tokens=70,
            allowed_token_ids=tuple(range(32, 120)),
        ),
        encoding=Encoding(add_special_tokens=False, parse_special=True),
    ),
    GenerationRequest("tiny:quiet", ["The quick", "dog"], SamplingParams(max_tokens=60, seed=1, n=2)),
]


@pytest.mark.parametrize("request_", CASES)
def test_a_request_that_loses_its_replicas_ends_as_if_it_had_not(
    replicas: LocalReplicas, follower: FixedFollower, adapted: Engine, request_: GenerationRequest
) -> None:
    engine, adapter = adapted, request_.model.partition(":")[2] or None
    random_ = random.Random(repr(request_))
    moments = sorted(random_.sample(range(1, 60), 6))

    async def ask() -> tuple[list[ChoiceDelta], list[ChoiceDelta]]:
        async with local_client(follower, replicas) as client:
            calm = await read(client, request_)
            return calm, await read(client, request_, lose_at(replicas, moments))

    calm, disturbed = asyncio.run(ask())
    assert len(replicas.submissions) > 3
    assert disturbed == calm
    encoding = dataclasses.asdict(request_.encoding)
    prompts = [engine.encode(p, **encoding) for p in request_.prompts]
    want = engine.generate(prompts, request_.params, adapter=adapter)
    assert [delta.stop_reason for delta in disturbed] == [completion.stop_reason for completion in want]
    assert [delta.token_ids for delta in disturbed] == [completion.token_ids for completion in want]
    echoes = [echo for echo in _echoes(engine, request_) for _ in range(request_.params.n)]
    assert [delta.text for delta in disturbed] == [e + c.text for e, c in zip(echoes, want, strict=True)]


def _echoes(engine: Engine, request: GenerationRequest) -> list[str]:
    assert engine.tokenizer is not None
    decode = engine.tokenizer.decode
    return [
        "" if not request.reporting.echo else prompt if isinstance(prompt, str) else decode(prompt)
        for prompt in request.prompts
    ]


def test_a_request_without_a_seed_goes_on_with_the_same_tokens(
    replicas: LocalReplicas, follower: FixedFollower, engine: Engine
) -> None:
    request = GenerationRequest("tiny", ["dog"], SamplingParams(max_tokens=80, ignore_eos=True))

    async def ask() -> list[ChoiceDelta]:
        async with local_client(follower, replicas) as client:
            return await read(client, request, lose_at(replicas, [10, 30]))

    [delta] = asyncio.run(ask())
    first, *others = replicas.submissions
    assert others
    assert first.params.seed is not None
    [want] = engine.generate(["dog"], first.params)
    assert delta.token_ids == want.token_ids
    assert delta.text == want.text


def test_a_client_that_leaves_frees_the_engine(replicas: LocalReplicas, follower: FixedFollower) -> None:
    request = GenerationRequest("tiny", ["dog", "The quick"], LONG)
    served = replicas.served[0]

    async def leave() -> None:
        async with local_client(follower, replicas) as client, aclosing(client.generate(request)) as events:
            assert isinstance(await anext(events), Accepted)
            assert isinstance(await anext(events), list)
            assert served.open_requests == 1
            await events.aclose()
            # Its blocks are free at the end of the step in progress.
            while served.open_requests or served.engine.stats.running:
                await asyncio.sleep(0)

    asyncio.run(leave())
    stats = served.engine.stats
    assert stats.running == stats.waiting == 0
    assert stats.generated_tokens < 500


class Poisoned:
    """Replicas that a request ends before they have given a token."""

    def __init__(self) -> None:
        self.lost = 0

    async def ask(
        self, deployment: str, ref: str, question: Question, adapter: AdapterVersion | None = None
    ) -> Reply:
        raise Lost("no replica is there")

    async def submit(self, deployment: str, submission: Submission) -> Answered:
        connection = await Sender().connect(submission.reply_to)
        connection.write(to_wire(submission.stream, Started("tiny", 1)))
        connection.flush()
        connection.close()
        self.lost += 1
        raise Lost("the replica that was answering has died")


def test_a_request_that_ends_its_replicas_is_given_up(follower: FixedFollower) -> None:
    replicas = Poisoned()

    async def ask() -> None:
        async with local_client(follower, replicas) as client:
            await read(client, GenerationRequest("tiny", ["a"], LONG))

    with pytest.raises(ApiError, match="in 4 tries in a row") as caught:
        asyncio.run(ask())
    assert caught.value.status == 503
    assert replicas.lost == 4


class Nobody(Poisoned):
    """No replica."""

    async def submit(self, deployment: str, submission: Submission) -> Answered:
        raise Lost("no replica is there")


def test_a_request_for_which_no_replica_comes_fails_in_time(follower: FixedFollower) -> None:
    async def ask() -> None:
        async with local_client(follower, Nobody(), resume_timeout_s=0.2) as client:
            await read(client, GenerationRequest("tiny", ["a"], LONG))

    with pytest.raises(ApiError, match=r"no replica is there, and no other one went on within 0\.2 s"):
        asyncio.run(ask())


class Busy(LocalReplicas):
    """Replicas that take a request once they are told to."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, max_num_seqs=8)
        self.free = asyncio.Event()

    async def submit(self, deployment: str, submission: Submission) -> Answered:
        await self.free.wait()
        return await super().submit(deployment, submission)

    async def ask(
        self, deployment: str, ref: str, question: Question, adapter: AdapterVersion | None = None
    ) -> Reply:
        await self.free.wait()
        return await super().ask(deployment, ref, question, adapter)


def test_the_follower_hears_where_requests_wait_and_which_version_they_use(
    model_dir: Path, follower: FixedFollower
) -> None:
    replicas = Busy(model_dir)

    async def report() -> ApiReport:
        """Return what the API says next."""
        seen = len(follower.reports)
        follower.table_now = replace(follower.table_now, revision=follower.table_now.revision + 1)
        while len(follower.reports) == seen:
            await asyncio.sleep(0.01)
        return follower.reports[-1]

    async def ask() -> list[ApiReport]:
        async with local_client(follower, replicas) as client, asyncio.timeout(30):
            events = client.generate(GenerationRequest("tiny", ["a"], LONG))
            first = asyncio.create_task(anext(events))
            await asyncio.sleep(0)
            waiting = await report()
            replicas.free.set()
            await first
            taken = await report()
            await events.aclose()
            ended = await report()
            replicas.free.clear()
            question = asyncio.create_task(client.ask("tiny", None, Describe()))
            await asyncio.sleep(0)
            asking = await report()
            replicas.free.set()
            await question
            return [waiting, taken, ended, asking, await report()]

    reports = asyncio.run(ask())
    replicas.stop()
    assert [(list(report.asked), list(report.in_use)) for report in reports] == [
        (["LlamaReplica"], ["tiny"]),
        ([], ["tiny"]),
        ([], []),
        (["LlamaReplica"], ["tiny"]),
        ([], []),
    ]
