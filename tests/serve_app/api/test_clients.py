"""OpenAI's own clients, synchronous and asynchronous, on both of its APIs for conversations."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel

from serve_app.api.api import create_api
from tests.serve_app.helpers import FixedFollower, LocalReplicas, local_client, table_of

QUESTION = [{"role": "user", "content": "The quick"}]
LIMITS: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(tuned: TestClient) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=tuned)


class Answer(BaseModel):
    a: bool


def test_chat(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_completion_tokens": 12, **LIMITS}
    whole = client.chat.completions.create(**body)
    [choice] = whole.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    # The client's own accumulation wants a text that is complete.
    body["extra_body"] = {"regex": "[a-z]{8}"}
    with client.chat.completions.stream(**body) as stream:
        final = stream.get_final_completion()
    assert (
        final.choices[0].message.content == client.chat.completions.create(**body).choices[0].message.content
    )
    usage = whole.usage
    assert usage is not None
    assert usage.completion_tokens == 12


def test_chat_gives_typed_answers(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="tiny", messages=[{"role": "user", "content": "?"}], response_format=Answer, max_tokens=200
    )
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_responses(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "Be brief."}, *QUESTION],
        max_tokens=12,
        **LIMITS,
    )
    body: dict[str, Any] = {"model": "tiny", "instructions": "Be brief.", "max_output_tokens": 12, **LIMITS}
    whole = client.responses.create(input="The quick", **body)
    assert whole.output_text == chat.choices[0].message.content
    assert (whole.status, whole.object) == ("incomplete", "response")
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None
    assert chat.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (chat.usage.prompt_tokens, 12)
    again = client.responses.create(input=QUESTION, **body)
    assert again.output_text == whole.output_text


def test_responses_take_back_what_they_gave(client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input=QUESTION, max_output_tokens=5)
    given = [*QUESTION, *[item.model_dump() for item in first.output], {"role": "user", "content": "dog"}]
    second = client.responses.create(model="tiny", input=given, max_output_tokens=5)
    assert second.output_text


def test_responses_stream_their_events(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny", "input": "The quick", "max_output_tokens": 12, **LIMITS}
    include = ["message.output_text.logprobs"]
    events = list(client.responses.create(**body, stream=True, include=include, top_logprobs=1))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    types = [event.type for event in events]
    assert types[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(types[4:-4]) == {"response.output_text.delta"}
    assert types[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    deltas = [event for event in events if isinstance(event, ResponseTextDeltaEvent)]
    text = client.responses.create(**body).output_text
    assert "".join(event.delta for event in deltas) == text
    assert sum(len(event.logprobs) for event in deltas) == 12
    with client.responses.stream(
        model="tiny", input="?", max_output_tokens=200, text_format=Answer
    ) as stream:
        final = stream.get_final_response()
    assert (final.status, final.output_parsed) == ("completed", Answer.model_validate_json(final.output_text))


def test_a_stream_of_responses_that_fails_says_so(client: openai.OpenAI, tuned_dir: Path) -> None:
    replicas = LocalReplicas(tuned_dir)
    api = create_api(lambda: local_client(FixedFollower(table_of(tuned_dir)), replicas, resume_timeout_s=0.1))
    body = {"model": "tiny", "input": "dog", "max_output_tokens": 2000, "ignore_eos": True, "stream": True}
    with TestClient(api) as http, http.stream("POST", "/v1/responses", json=body) as response:
        lines = response.iter_lines()
        assert next(lines) == "event: response.created"
        replicas.stop()
        events = [line for line in lines if line.startswith("event: ")]
    assert events[-1] == "event: response.failed"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "2"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"text": {"format": {"type": "xml"}}}, "text"),
        ({"extra_body": {"n": 2}}, "n"),
        ({"extra_body": {"response_format": {"type": "text"}}}, "response_format"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ],
)
def test_what_responses_do_not_support_is_named(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**({"model": "tiny", "input": "a"} | fields))
    assert caught.value.param == param
    assert param in caught.value.message


def test_what_has_no_effect_is_accepted(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "store": True,
        "metadata": {"a": "b"},
        "reasoning": {"effort": "low"},
        "text": {"verbosity": "low"},
        "include": ["reasoning.encrypted_content"],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "service_tier": "auto",
    }
    response = client.responses.create(model="tiny", input="a", max_output_tokens=2, **fields)
    assert (response.metadata, response.store) == ({"a": "b"}, False)  # type: ignore[attr-defined]


def test_asynchronous_clients(tuned_dir: Path, tuned_replicas: LocalReplicas) -> None:
    api = create_api(lambda: local_client(FixedFollower(table_of(tuned_dir)), tuned_replicas))

    async def ask() -> tuple[str, ...]:
        transport = httpx.AsyncClient(transport=httpx.ASGITransport(api))
        url = "http://testserver/v1"
        async with (
            api.router.lifespan_context(api),
            openai.AsyncOpenAI(base_url=url, api_key="none", http_client=transport) as client,
        ):
            body: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 12, **LIMITS}
            whole = await client.chat.completions.create(**body)
            chunks = [chunk async for chunk in await client.chat.completions.create(**body, stream=True)]
            response = await client.responses.create(
                model="tiny", input="The quick", max_output_tokens=12, **LIMITS
            )
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return whole.choices[0].message.content or "", streamed, response.output_text

    assert len(set(asyncio.run(ask()))) == 1


def test_a_header_says_what_made_a_prompt_of_the_conversation(tuned: TestClient, tuned_dir: Path) -> None:
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 1}
    assert tuned.post("/v1/chat/completions", json=body).headers["x-chat-template"] == "from the checkpoint"
    assert (
        "x-chat-template"
        not in tuned.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1}).headers
    )
