"""Requests as other clients send them, field by field, and what these clients read of the answers.

They are those of the documentation and the sources of Open WebUI, LibreChat, LiteLLM, guidellm, aiperf and vLLM's
benchmark.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from llama_ray.generation.engine import Engine
from tests.serve_app.api.clients.helpers import MAX_TOKENS, MESSAGES, PROMPT, answer, completion

USAGE = {"include_usage": True}
CHAT: dict[str, dict[str, Any]] = {
    "open webui": {"stream": True, "model": "tiny", "messages": MESSAGES, "stream_options": USAGE},
    "librechat": {
        "model": "tiny",
        "user": "6749f0c2a1b2c3d4e5f60718",
        "stream": True,
        "stream_options": USAGE,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "messages": MESSAGES,
    },
    "litellm": {
        "model": "tiny",
        "messages": MESSAGES,
        "stream": True,
        "stream_options": USAGE,
        "n": 1,
        "logit_bias": {},
        "metadata": {"user_api_key": "hash"},
        "parallel_tool_calls": True,
        "reasoning_effort": "low",
    },
    "vllm bench": {
        "model": "tiny",
        "messages": [MESSAGES[0], {"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
        "max_completion_tokens": MAX_TOKENS,
        "stream": True,
        "stream_options": USAGE,
        "ignore_eos": True,
    },
    "guidellm": {
        "messages": [MESSAGES[0], {"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
        "model": "tiny",
        "stream": True,
        "stream_options": USAGE | {"continuous_usage_stats": True},
        "max_completion_tokens": MAX_TOKENS,
        "stop": None,
        "ignore_eos": True,
    },
    "aiperf": {
        "messages": MESSAGES,
        "model": "tiny",
        "stream": True,
        "max_completion_tokens": MAX_TOKENS,
        "min_tokens": MAX_TOKENS,
        "ignore_eos": True,
        "stream_options": USAGE,
    },
}
COMPLETIONS: dict[str, dict[str, Any]] = {
    "vllm bench": {
        "model": "tiny",
        "prompt": PROMPT,
        "repetition_penalty": 1.0,
        "max_tokens": MAX_TOKENS,
        "logprobs": None,
        "stream": True,
        "stream_options": USAGE,
        "ignore_eos": True,
    },
    "guidellm": {
        "model": "tiny",
        "prompt": PROMPT,
        "stream": True,
        "stream_options": USAGE | {"continuous_usage_stats": True},
        "max_tokens": MAX_TOKENS,
        "stop": None,
        "ignore_eos": True,
    },
    "aiperf": {
        "prompt": PROMPT,
        "model": "tiny",
        "stream": True,
        "max_tokens": MAX_TOKENS,
        "stream_options": USAGE,
        "ignore_eos": True,
    },
}


@pytest.fixture
def http(endpoint: str, key: str) -> Iterator[httpx.Client]:
    headers = {
        "Authorization": f"Bearer {key}",
        "x-request-id": "benchmark-1",
        "HTTP-Referer": "https://openwebui.com/",
        "X-Title": "Open WebUI",
        "X-OpenWebUI-User-Name": "Zo%C3%AB",
        "X-OpenWebUI-User-Role": "admin",
    }
    with httpx.Client(base_url=endpoint, headers=headers) as http:
        yield http


def chunks(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """All chunks of a greedy stream."""
    response = http.post(path, json=body | {"temperature": 0, "max_tokens": MAX_TOKENS})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_open_webui_finds_the_model(http: httpx.Client) -> None:
    models = http.get("/v1/models").json()
    assert models["object"] == "list"
    assert "tiny" in [model["id"] for model in models["data"]]


def test_open_webui_asks_for_the_title_of_a_chat(http: httpx.Client, reference: Engine) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "stream": False, "max_completion_tokens": MAX_TOKENS}
    got = http.post("/v1/chat/completions", json=body | {"temperature": 0}).json()
    want = answer(reference)
    assert got["choices"][0]["message"]["content"] == want.text
    assert got["choices"][0]["finish_reason"] == want.finish_reason
    assert got["usage"]["total_tokens"] == len(want.prompt_token_ids) + len(want.token_ids)


@pytest.mark.parametrize("client", CHAT)
def test_a_chat_is_streamed(http: httpx.Client, reference: Engine, client: str) -> None:
    body = CHAT[client]
    *parts, last = chunks(http, "/v1/chat/completions", body)
    choices = [part["choices"][0] for part in parts]
    want = answer(reference, ignore_eos=body.get("ignore_eos", False))
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == want.text
    assert all("finish_reason" in choice for choice in choices)
    # Clients lose text that comes together with it.
    assert not choices[-1]["delta"].get("content")
    assert choices[-1]["finish_reason"] == want.finish_reason
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(want.token_ids)


@pytest.mark.parametrize("client", COMPLETIONS)
def test_a_completion_is_streamed(http: httpx.Client, reference: Engine, client: str) -> None:
    body = COMPLETIONS[client]
    *parts, last = chunks(http, "/v1/completions", body)
    want = completion(reference, ignore_eos=True)
    assert {part["object"] for part in parts} == {"text_completion"}
    assert "".join(part["choices"][0]["text"] for part in parts) == want.text
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(want.token_ids)
    if "continuous_usage_stats" in body["stream_options"]:
        assert [part["usage"]["completion_tokens"] for part in parts][-1] == len(want.token_ids)
