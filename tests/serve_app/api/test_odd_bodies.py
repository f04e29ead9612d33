"""Any JSON in any field: an answer or a short 400, never an error of the server's own."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from serve_app.api.api import create_api
from serve_app.protocol.chat import ChatRequest
from serve_app.protocol.completions import CompletionRequest
from serve_app.protocol.messages import Message
from serve_app.protocol.responses_api import ResponsesRequest
from serve_app.protocol.sampling import SamplingFields
from tests.serve_app.helpers import FixedFollower, LocalReplicas, local_client, table_of

ODD = [
    *(
        "null",
        "true",
        "false",
        "0",
        "-0",
        "-0.0",
        "1",
        "-1",
        "1.0",
        "0.5",
        "2147483648",
        "9223372036854775808",
    ),
    *("18446744073709551616", "1e39", "-1e39", "1e400", "1e-46", "NaN", "-Infinity", "9" * 4000, "9" * 5000),
    *('""', '"a"', '"1"', '"\\ud800"', '"\\u0000"', '"🙂"', '"(a?){500}"', '"["', f'"{"x" * 2000}"'),
    *(
        "[]",
        "[[]]",
        "[null]",
        "[1]",
        "[true]",
        "[-1]",
        "[1e400]",
        "[[1, 2], [3]]",
        '["a", 1]',
        '["a", "b"]',
        "[{}]",
    ),
    *(
        "{}",
        '{"": 1}',
        '{"1": 1}',
        '{"1": null}',
        '{"-1": 1}',
        '{"999": 1}',
        '{"a": {"b": [1]}}',
        '{"$ref": "#"}',
    ),
    *('{"type": "object"}', '{"include_usage": true}', '{"include_usage": 1}', "[" * 200 + "]" * 200),
    '{"a":' * 200 + "1" + "}" * 200,
]
FIELDS = [*CompletionRequest.model_fields, "unknown", "", "prompt_logprobs", "\\ud800"]
BODIES = {
    "/v1/completions": {"prompt": '"a"', "max_tokens": "2"},
    "/v1/chat/completions": {"messages": '[{"role": "user", "content": "a"}]', "max_tokens": "2"},
    "/v1/responses": {"input": '"a"', "max_output_tokens": "2"},
}
# What the bodies of conversations have beside the fields that they share with completions.
CONVERSATIONS = [
    *(
        ("/v1/chat/completions", field)
        for field in ChatRequest.model_fields.keys() - SamplingFields.model_fields
    ),
    *(
        ("/v1/responses", field)
        for field in ResponsesRequest.model_fields.keys() - SamplingFields.model_fields
    ),
]


@pytest.fixture(scope="module")
def http(model_dir: Path) -> Iterator[TestClient]:
    replicas, follower = LocalReplicas(model_dir), FixedFollower(table_of(model_dir))
    api = create_api(lambda: local_client(follower, replicas))
    with TestClient(api, raise_server_exceptions=False) as http:
        yield http
    replicas.stop()


def check(http: TestClient, fields: dict[str, str], path: str = "/v1/completions") -> int:
    """Send a body whose values are JSON already; return the status."""
    given = {"model": '"tiny"', **BODIES[path]} | fields
    content = "{" + ", ".join(f'"{name}": {value}' for name, value in given.items()) + "}"
    response = http.post(path, content=content.encode(), headers={"Content-Type": "application/json"})
    if response.status_code != 200:
        error = json.loads(response.text)["error"]
        assert response.status_code in (400, 404), (content[:200], error)
        assert 0 < len(error["message"]) <= 1000, content[:200]
        assert len(error["param"] or "") <= 100
    return response.status_code


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field or "empty")
def test_a_field_with_any_value_is_answered_or_refused(http: TestClient, field: str) -> None:
    statuses = {check(http, {field: value}) for value in ODD}
    assert statuses & {400, 404}


def test_several_fields_with_any_values_are_answered_or_refused(http: TestClient) -> None:
    rng = random.Random(0)
    statuses = [check(http, {rng.choice(FIELDS): rng.choice(ODD) for _ in range(2)}) for _ in range(400)]
    assert statuses.count(200) > 20


@pytest.mark.parametrize(("path", "field"), sorted(CONVERSATIONS))
def test_a_field_of_a_conversation_with_any_value_is_answered_or_refused(
    http: TestClient, path: str, field: str
) -> None:
    statuses = {check(http, {field: value}, path) for value in ODD}
    assert statuses & {400, 404}


@pytest.mark.parametrize("field", sorted(Message.model_fields.keys() - {"role"}))
def test_a_message_with_any_value_is_answered_or_refused(http: TestClient, field: str) -> None:
    messages = (f'[{{"role": "user", "content": "a", "{field}": {value}}}]' for value in ODD)
    assert 200 in {check(http, {"messages": value}, "/v1/chat/completions") for value in messages}
