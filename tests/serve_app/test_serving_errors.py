"""Clients that go away, too many requests, and bad ones, in a real Ray Serve instance."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import openai
import pytest

from llama_ray.generation.stats import EngineStats
from tests.serve_app.helpers import MAX_QUEUED, MAX_SEQ_LEN


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_the_engine(
    served: str, stats: Callable[[], EngineStats], become_idle: Callable[[], bool], stream: bool
) -> None:
    before = stats()
    assert before.running == before.waiting == 0
    body = {
        "model": "tiny",
        "prompt": ["dog", "The quick"],
        "n": 2,
        "max_tokens": MAX_SEQ_LEN - 100,
        "ignore_eos": True,
        "stream": stream,
    }
    with httpx.Client() as http:
        if stream:
            with http.stream("POST", f"{served}/v1/completions", json=body) as response:
                texts = response.iter_text()  # the connection is closed when this is collected
                next(texts)
                assert stats().running == 4
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post(f"{served}/v1/completions", json=body, timeout=0.3)
    assert become_idle()
    now = stats()
    assert now.requests == before.requests + 2
    assert 0 < now.generated_tokens - before.generated_tokens < 4 * (MAX_SEQ_LEN - 100)


def test_an_overloaded_server_says_so_and_is_still_healthy(
    served: str, become_idle: Callable[[], bool]
) -> None:
    body = {"model": "tiny", "prompt": "dog", "max_tokens": MAX_SEQ_LEN - 100, "ignore_eos": True}

    async def overload() -> tuple[httpx.Response, httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served, timeout=None, limits=limits) as http:
            held = {asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(MAX_QUEUED)}
            refused = None
            # One more each time, until the queue is full.
            while refused is None:
                held.add(asyncio.create_task(http.post("/v1/completions", json=body)))
                done, held = await asyncio.wait(held, timeout=0.05, return_when=asyncio.FIRST_COMPLETED)
                refused = next((r for task in done if (r := task.result()).status_code != 200), None)
            health = await http.get("/health")
            for request in held:
                request.cancel()
            await asyncio.gather(*held, return_exceptions=True)
            return refused, health

    refused, health = asyncio.run(overload())
    assert refused.status_code == 429, refused.text
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    assert become_idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("change", "status", "param", "message"),
    [
        ({"model": "gpt-4"}, 404, "model", "model 'gpt-4' is not served here; ask for 'tiny'"),
        ({"temperature": -1}, 400, "temperature", "temperature is -1"),
        ({"prompt": "a b " * MAX_SEQ_LEN}, 400, "prompt", "shorten the prompt"),
        ({"max_tokens": MAX_SEQ_LEN}, 400, "prompt", f"exceed max_seq_len {MAX_SEQ_LEN}"),
        ({"prompt": ["dog", ""], "max_tokens": MAX_SEQ_LEN - 2}, 400, "prompt", "exceed max_seq_len"),
        ({"prompt": [[1, 2], [70000]]}, 400, "prompt", "token id 70000 is outside"),
        ({"extra_body": {"top_kk": 5}}, 400, "top_kk", "top_kk is not a field that this server knows"),
    ],
)
def test_a_bad_request_is_an_error_the_client_understands(
    client: openai.OpenAI,
    become_idle: Callable[[], bool],
    change: dict[str, object],
    status: int,
    param: str | None,
    message: str,
    stream: bool,
) -> None:
    request = {"model": "tiny", "prompt": "dog", "stream": stream} | change
    with pytest.raises(openai.APIStatusError, match=message) as caught:
        client.completions.create(**request)  # type: ignore[call-overload]
    assert caught.value.status_code == status
    assert caught.value.param == param
    assert become_idle()  # nothing goes on for the prompts beside a bad one
