"""Chat completions as clients see them, around replicas in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from llama_ray.data.chat.template import ChatPrompt
from llama_ray.generation.completion import Completion
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from serve_app.protocol.chat import ChatChunk
from tests.serve_app.helpers import EMOJI, MAX_SEQ_LEN, LocalReplicas

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"The quick {EMOJI}"}]
BODY = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "seed": 1}


@pytest.fixture(scope="module")
def reference(tuned_dir: Path) -> Engine:
    return Engine.from_pretrained(tuned_dir, device="cpu")


def expected(engine: Engine, messages: list[dict[str, Any]] = MESSAGES, **params: Any) -> list[Completion]:
    return engine.generate([ChatPrompt(messages)], SamplingParams(**{"max_tokens": 24, "seed": 1, **params}))


def ask(http: TestClient, **fields: Any) -> dict[str, Any]:
    response = http.post(PATH, json=BODY | fields)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def stream(http: TestClient, **fields: Any) -> list[dict[str, Any]]:
    """All chunks of a stream, each of which is what pydantic would write."""
    response = http.post(PATH, json=BODY | fields | {"stream": True})
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    for chunk in chunks:
        ChatChunk.model_validate(chunk, strict=True, extra="forbid")
    return chunks


def test_an_answer_is_what_the_engine_writes_after_the_rendered_conversation(
    tuned: TestClient, reference: Engine
) -> None:
    want = expected(reference, n=2)
    got = ask(tuned, n=2)
    assert [choice["message"]["content"] for choice in got["choices"]] == [c.text for c in want]
    assert [choice["finish_reason"] for choice in got["choices"]] == [c.finish_reason for c in want]
    assert got["choices"][0]["message"] == {"role": "assistant", "content": want[0].text, "refusal": None}
    assert (got["object"], got["system_fingerprint"]) == ("chat.completion", "tiny")
    usage = got["usage"]
    assert usage["prompt_tokens"] == len(want[0].prompt_token_ids)
    assert usage["completion_tokens"] == sum(len(c.token_ids) for c in want)


def test_a_stream_has_role_text_and_end_in_chunks_of_their_own(tuned: TestClient, reference: Engine) -> None:
    chunks = stream(tuned, n=2, stream_options={"include_usage": True})
    *chunks, last = chunks
    assert last["choices"] == []
    assert last["usage"] == ask(tuned, n=2)["usage"] | {
        "prompt_tokens_details": last["usage"]["prompt_tokens_details"]
    }
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    for index, want in enumerate(expected(reference, n=2)):
        first, *middle, end = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"]["content"] for choice in middle) == want.text
        assert {choice["finish_reason"] for choice in (first, *middle)} == {None}
        assert (end["delta"], end["finish_reason"]) == ({}, want.finish_reason)


def test_streams_without_usage_do_not_mention_it(tuned: TestClient) -> None:
    assert not any("usage" in chunk for chunk in stream(tuned))


@pytest.mark.parametrize("top", [None, 0, 2])
def test_log_probabilities_are_those_of_the_engine(
    tuned: TestClient, reference: Engine, top: int | None
) -> None:
    fields = {"logprobs": True, "top_logprobs": top, "temperature": 0}
    [want] = expected(reference, logprobs=top or 0, temperature=0)
    assert want.logprobs is not None
    [choice] = ask(tuned, **fields)["choices"]
    content = choice["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == pytest.approx(
        [entry.logprob for entry in want.logprobs]
    )
    content_bytes = bytes(byte for entry in content for byte in entry["bytes"])
    assert content_bytes.decode(errors="replace") == want.text
    for entry, position in zip(content, want.logprobs, strict=True):
        assert [other["logprob"] for other in entry["top_logprobs"]] == pytest.approx(
            [p for _, p in position.top]
        )
    chunks = [c for chunk in stream(tuned, **fields) for c in chunk["choices"] if c["logprobs"]]
    assert [entry for chunk in chunks for entry in chunk["logprobs"]["content"]] == content


def test_a_number_of_tokens_has_two_names_and_the_context_for_a_default(tuned: TestClient) -> None:
    assert ask(tuned, max_completion_tokens=5)["usage"]["completion_tokens"] == 5
    near = [{"role": "user", "content": "x" * (MAX_SEQ_LEN - 60)}]
    usage = ask(tuned, max_tokens=None, messages=near, ignore_eos=True)["usage"]
    assert usage["total_tokens"] == MAX_SEQ_LEN
    response = tuned.post(PATH, json=BODY | {"messages": near, "max_tokens": 200})
    assert response.status_code == 400
    error = response.json()["error"]
    assert "max_tokens 200 exceed max_seq_len" in error["message"]
    assert error["param"] == "messages"


def test_parts_and_strings_are_the_same(tuned: TestClient) -> None:
    parts = [{"type": "text", "text": "The quick"}, {"type": "text", "text": "fox"}]
    one, two = ([{"role": "user", "content": content}] for content in (parts, "The quick\nfox"))
    assert ask(tuned, messages=one)["choices"] == ask(tuned, messages=two)["choices"]


def test_developer_speaks_as_system(tuned: TestClient) -> None:
    other = [MESSAGES[0] | {"role": "developer"}, MESSAGES[1]]
    assert ask(tuned, messages=other)["choices"] == ask(tuned)["choices"]


def test_an_answer_goes_on_with_what_it_begins_with(tuned: TestClient, reference: Engine) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Once upon"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    got = ask(tuned, messages=messages, **fields)["choices"][0]["message"]["content"]
    assert reference.tokenizer is not None
    text = reference.tokenizer.render_chat(ChatPrompt(messages, False, True)).text
    assert text.endswith("<|assistant|>\nOnce upon")
    [want] = reference.generate([ChatPrompt(messages, False, True)], SamplingParams(max_tokens=24, seed=1))
    assert got == want.text


def test_json_can_be_asked_for(tuned: TestClient) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    format = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    [choice] = ask(tuned, response_format=format, max_tokens=100)["choices"]
    assert json.loads(choice["message"]["content"])["a"] in (1, 2)
    assert choice["finish_reason"] == "stop"


def test_a_conversation_that_loses_its_replica_goes_on(
    tuned: TestClient, tuned_replicas: LocalReplicas
) -> None:
    body = BODY | {"max_tokens": 600, "ignore_eos": True}
    calm = tuned.post(PATH, json=body).json()["choices"][0]["message"]["content"]
    before = len(tuned_replicas.submissions)
    text = ""
    with tuned.stream("POST", PATH, json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if '"content":' in line:
                if not text:
                    tuned_replicas.lose()
                text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["content"] or " "
    assert len(tuned_replicas.submissions) > before + 1
    assert text.removeprefix(" ") == calm


def test_tools_are_accepted_when_none_is_to_be_called(tuned: TestClient) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    assert ask(tuned, tools=tools, tool_choice="none")["choices"] == ask(tuned)["choices"]
    for choice in (None, "auto", "required", {"type": "function", "function": {"name": "add"}}):
        response = tuned.post(PATH, json=BODY | {"tools": tools, "tool_choice": choice})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "messages: list should have at least 1 item"),
        ({"messages": "hi"}, "messages", "messages: "),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages", "messages.0.role: "),
        (
            {"messages": [{"role": "user", "content": 1}]},
            "messages",
            "messages.0.content must be a string or",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "this model reads text only",
        ),
        ({"max_tokens": 0}, "max_tokens", "max_tokens: input should be greater than or equal to 1"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "max_completion_tokens: "),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs to be true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logprobs": 2}, "logprobs", "logprobs: input should be a valid boolean"),
        ({"continue_final_message": True}, "continue_final_message", "are both true"),
        ({"tool_choice": "required"}, "tool_choice", 'must be "none" or "auto"'),
        ({"functions": []}, "functions", "functions is not a field that this server knows"),
        ({"chat_template": "{{ x }}"}, "chat_template", "chat_template is not a field"),
        ({"modalities": ["audio"]}, "modalities", "modalities"),
        ({"n": 0}, "n", "n is 0"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "lone surrogate"),
        ({"stop": ["a"] * 17}, "stop", "stop has 17 strings"),
    ],
)
def test_a_bad_field_is_named(tuned: TestClient, fields: dict[str, Any], param: str, message: str) -> None:
    content = json.dumps(BODY | fields)
    response = tuned.post(PATH, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
