"""Replicas that are killed or stopped in the middle of answers, in a real Ray Serve instance: nothing is lost."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from serve_app.args import ServeArgs
from tests.serve_app.application import Answer, Application, Body, Streaming, eventually, kill
from tests.serve_app.helpers import MAX_SEQ_LEN

LENGTH = 3000
WORDS = {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 40, "maxItems": 40}
LONG: Body = {"model": "tiny", "prompt": "The quick", "max_tokens": LENGTH, "ignore_eos": True}
BODIES: dict[str, Body] = {
    "plain": {"seed": 1, "temperature": 0.9, "top_p": 0.9},
    "logprobs": {"seed": 2, "logprobs": 2},
    "stop": {"seed": 3, "stop": ["to be filled in"]},
    "json_schema": {"seed": 4, "json_schema": WORDS, "ignore_eos": False, "logprobs": 0},
    "n": {"seed": 5, "n": 2, "max_tokens": LENGTH // 2},
    "penalties": {"seed": 6, "presence_penalty": 0.5, "frequency_penalty": 0.1, "repetition_penalty": 1.1},
    "prompts": {"seed": 7, "prompt": ["dog", "Zwölf"], "echo": True, "max_tokens": LENGTH // 2},
    "greedy": {"temperature": 0, "logprobs": 0},
}
MAX_ONGOING = 5
"""Of each of two replicas: while more requests than that are under way, both have some."""
RUNNING, QUEUED = 2, 6
"""Requests that the replica of the second application takes, and those that may wait for it."""


@pytest.fixture(scope="module")
def application(serve_url: str, model_dir: Path) -> Iterator[Application]:
    args = ServeArgs(
        model=str(model_dir),
        num_cpus=0.5,
        min_replicas=2,
        max_replicas=2,
        max_num_seqs=16,
        max_ongoing_requests=MAX_ONGOING,
        stuck_after_s=3,
        graceful_shutdown_timeout_s=60,
    )
    application = Application(serve_url, "losses", args)
    application.start()
    yield application
    application.stop()


@pytest.fixture
def replicas(application: Application) -> list[int]:
    """The processes of the two replicas."""
    eventually(lambda: len(application.pids("LlamaReplica")) == 2, "the start of a lost replica")
    return application.pids("LlamaReplica")


@pytest.fixture(scope="module")
def undisturbed(application: Application) -> dict[str, tuple[Body, Answer]]:
    """Requests and their answers while nothing happens."""
    bodies = {name: LONG | body for name, body in BODIES.items()}
    text = application.complete(bodies["stop"]).choices[0].text
    # As late as can be: the last text of some characters that is not earlier in the answer.
    end = next(i for i in range(len(text) - 4, 0, -1) if text.find(text[i : i + 4]) == i)
    bodies["stop"] |= {"stop": [text[end : end + 4]]}
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(application.complete, bodies.values()))
    assert answers[list(bodies).index("stop")].choices[0].finish_reason == "stop"
    return {name: (body, answer) for (name, body), answer in zip(bodies.items(), answers, strict=True)}


def begin_streams(
    application: Application, undisturbed: dict[str, tuple[Body, Answer]]
) -> dict[str, Streaming]:
    """Begin all streams, and wait until each has some text.

    The one with a schema comes first: a new replica starts a process that compiles it, and others would end meanwhile.
    """
    streams = {"json_schema": application.stream(undisturbed["json_schema"][0])}
    streams["json_schema"].wait_for_text()
    streams |= {
        name: application.stream(body) for name, (body, _) in undisturbed.items() if name not in streams
    }
    for stream in streams.values():
        stream.wait_for_text()
    return streams


@pytest.mark.parametrize("killed", [1, 2])
def test_answers_under_way_are_those_of_an_undisturbed_run_when_replicas_are_killed(
    application: Application,
    undisturbed: dict[str, tuple[Body, Answer]],
    replicas: list[int],
    killed: int,
) -> None:
    with ThreadPoolExecutor() as pool:
        streams = begin_streams(application, undisturbed)
        whole = pool.submit(application.complete, undisturbed["plain"][0])
        kill(replicas[:killed])
        assert sum(not stream.done for stream in streams.values()) > MAX_ONGOING
        assert {name: stream.result() for name, stream in streams.items()} == {
            name: answer for name, (_, answer) in undisturbed.items()
        }
        assert whole.result() == undisturbed["plain"][1]


def test_a_replica_whose_process_is_stopped_is_replaced_and_its_streams_move(
    application: Application, undisturbed: dict[str, tuple[Body, Answer]], replicas: list[int]
) -> None:
    streams = begin_streams(application, undisturbed)
    kill(replicas[:1], signal.SIGSTOP)
    assert sum(not stream.done for stream in streams.values()) > MAX_ONGOING
    while replicas[0] in application.pids("LlamaReplica"):
        # An answer that does not reach the stopped process keeps none from others.
        application.call("RegistryFollower", "look_now", timeout_s=4)
    assert {name: stream.result() for name, stream in streams.items()} == {
        name: answer for name, (_, answer) in undisturbed.items()
    }
    assert application.pids("LlamaReplica")[0] != replicas[0]


@pytest.fixture(scope="module")
def hurried(serve_url: str, model_dir: Path) -> Iterator[Application]:
    """An application with two processes of the API and one replica, for which nobody waits when it is lost."""
    args = ServeArgs(
        model=str(model_dir),
        num_cpus=0.5,
        max_replicas=1,
        min_api_replicas=2,
        max_num_seqs=RUNNING,
        max_ongoing_requests=RUNNING,
        max_queued_requests=QUEUED,
        resume_timeout_s=0.5,
        graceful_shutdown_timeout_s=1,
    )
    application = Application(serve_url, "hurried", args)
    application.start()
    yield application
    application.stop()


def test_processes_of_the_api_together_let_no_more_requests_wait_than_the_limit(hurried: Application) -> None:
    assert len(hurried.pids("Api")) == 2
    body = LONG | {"max_tokens": MAX_SEQ_LEN - 100}
    number = 30

    async def overload() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=hurried.url, timeout=None, limits=limits) as http:
            requests = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(number)]
            refused = list[int]()
            for answered in asyncio.as_completed(requests):
                response = await answered
                refused.append(response.status_code)
                if len(refused) == number - RUNNING - QUEUED:
                    break
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
        return refused

    # None has been answered by then.
    assert set(asyncio.run(overload())) == {429}


def test_a_stream_that_no_replica_goes_on_with_in_time_ends_with_an_error_after_all_that_came(
    hurried: Application,
) -> None:
    body = LONG | {"seed": 1}
    eventually(
        lambda: hurried.http.post("/v1/completions", json=LONG | {"max_tokens": 1}).is_success,
        "the end of the requests of another test",
    )
    whole = hurried.complete(body).choices[0].text
    stream = hurried.stream(body)
    stream.wait_for_text()
    kill(hurried.pids("LlamaReplica"))
    answer = stream.result()
    assert answer.error is not None
    assert "no other one went on within 0.5 s" in answer.error
    [choice] = answer.choices.values()
    assert choice.text
    assert whole.startswith(choice.text)
    assert (choice.finish_reason, answer.usage) == (None, None)
