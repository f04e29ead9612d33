"""The HTTP application around a replica in this process: what happens when the model fails."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from serve_app.api.api import HttpOptions, create_api
from serve_app.errors import INTERNAL_ERROR
from serve_app.registry.messages import Table
from tests.generation.constraints.helpers import COSTLY_MASK
from tests.serve_app.helpers import MAX_SEQ_LEN, FixedFollower, LocalReplicas, local_client, table_of

# A text that the engine is still writing when its first part has arrived.
BODY = {"model": "tiny", "prompt": "dog", "max_tokens": MAX_SEQ_LEN - 100, "ignore_eos": True}


@pytest.fixture
def replicas(model_dir: Path) -> Iterator[LocalReplicas]:
    replicas = LocalReplicas(model_dir)
    yield replicas
    replicas.stop()


@pytest.fixture
def follower(model_dir: Path) -> FixedFollower:
    return FixedFollower(table_of(model_dir))


@pytest.fixture
def http(replicas: LocalReplicas, follower: FixedFollower) -> Iterator[TestClient]:
    api = create_api(lambda: local_client(follower, replicas, resume_timeout_s=0.5))
    with TestClient(api, raise_server_exceptions=False) as http:
        yield http


def test_an_error_after_the_first_byte_is_an_event(replicas: LocalReplicas, http: TestClient) -> None:
    with http.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        first = next(lines)
        replicas.stop()
        *_, error, empty, done, end = lines
    assert json.loads(first.removeprefix("data: "))["choices"]
    error = json.loads(error.removeprefix("data: "))["error"]
    assert error["code"] == "unavailable"
    assert "has ended, and no other one went on within 0.5 s" in error["message"]
    assert (empty, done, end) == ("", "data: [DONE]", "")


def test_an_error_before_the_first_byte_has_a_status(replicas: LocalReplicas, http: TestClient) -> None:
    replicas.stop()
    for stream in (False, True):
        response = http.post("/v1/completions", json=BODY | {"stream": stream})
        assert response.status_code == 503
        assert response.json()["error"]["type"] == "server_error"


def test_an_answer_names_the_version_that_gave_it(http: TestClient) -> None:
    for stream in (False, True):
        response = http.post("/v1/completions", json=BODY | {"max_tokens": 3, "stream": stream})
        assert response.headers["x-model-version"] == "tiny"
        assert '"system_fingerprint":"tiny"' in response.text


class Panicked(BaseException):
    """As pyo3's PanicException, which is no Exception either."""


@pytest.mark.parametrize("method", ["encode_prompt", "stream"])
def test_a_panic_of_a_native_library_fails_its_request_alone(
    http: TestClient, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def panic(*arguments: object, **options: object) -> None:
        raise Panicked("index out of bounds")

    body = BODY | {"max_tokens": 3}
    expected = http.post("/v1/completions", json=body | {"seed": 1}).json()["choices"]
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, method, panic)
        response = http.post("/v1/completions", json=body)
        assert response.status_code == 500
        assert response.json()["error"]["message"] == INTERNAL_ERROR
    assert http.post("/v1/completions", json=body | {"seed": 1}).json()["choices"] == expected


def test_readiness_is_that_of_the_models_and_health_that_of_the_process(
    http: TestClient, follower: FixedFollower
) -> None:
    assert http.get("/ready").json() == {"status": "ready"}
    [model] = follower.table_now.models
    gone = replace(model, versions=tuple(replace(status, ready={}) for status in model.versions))
    follower.table_now = Table(2, (gone,))
    while (response := http.get("/ready")).status_code == 200:
        pass
    assert response.status_code == 503
    assert "tiny has no replica that is ready" in response.json()["error"]["message"]
    assert response.headers["retry-after"] == "5"
    assert http.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "the body is not JSON"),
        ("[]", "the body must be a JSON object"),
        ('{"prompt": "a"}', "model is required"),
    ],
)
def test_a_body_that_is_not_a_request_is_a_400(http: TestClient, content: str, message: str) -> None:
    response = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


async def statuses(app: FastAPI, chunks: Iterator[bytes]) -> list[int]:
    """Send a body without Content-Length; return the status of the response, if there is one."""
    found, sent_all = list[int](), asyncio.Event()

    async def receive() -> dict[str, object]:
        if sent_all.is_set():
            await asyncio.Event().wait()
        chunk = next(chunks, None)
        if chunk is None:
            sent_all.set()
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            found.append(message["status"])

    headers = [(b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "app": app,
        "method": "POST",
        "path": "/v1/completions",
        "headers": headers,
        "query_string": b"",
    }
    await app(scope, receive, send)
    return found


def test_a_body_beyond_the_limit_is_a_413_however_it_is_sent(
    replicas: LocalReplicas, follower: FixedFollower
) -> None:
    app = create_api(lambda: local_client(follower, replicas), HttpOptions(max_body_bytes=1000))
    with TestClient(app) as http:
        response = http.post("/v1/completions", json=BODY | {"prompt": "a" * 1000})
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
        assert "1,000 bytes" in response.json()["error"]["message"]
        endless = itertools.repeat(b"x" * 100)
        assert http.portal is not None
        assert http.portal.call(statuses, app, endless) == [413]
        body = json.dumps(BODY | {"max_tokens": 1}).encode()
        assert http.portal.call(statuses, app, iter([body[:9], body[9:]])) == [200]


def test_unknown_paths_and_methods_are_errors_of_the_same_shape(http: TestClient) -> None:
    assert http.get("/v2").status_code == 404
    assert "GET /v2" in http.get("/v2").json()["error"]["message"]
    assert http.get("/v1/completions").status_code == 405
    assert http.get("/v1/completions").json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ('"json_schema": ' + '{"not": ' * 900 + "{}" + "}" * 900, ""),
        ('"json_schema": ' + '{"not": ' * 300 + "{}" + "}" * 300, "json_schema is nested 301 levels deep"),
        ('"json_schema": {"$ref": "#"}', "json_schema cannot be enforced: no token"),
        ('"json_schema": {"const": "\\ud800"}', "json_schema cannot be enforced: "),
        ('"regex": "(?:a?){500}a{500}"', "regex cannot be enforced: it grows too complex"),
        (f'"regex": "{"a" * 1_000_000}"', "regex has 1,000,000 bytes; it must have at most 262,144"),
    ],
)
def test_a_grammar_that_cannot_be_enforced_is_a_400_that_names_its_field(
    http: TestClient, constraint: str, message: str
) -> None:
    body = f'{{"model": "tiny", "prompt": "dog", {constraint}}}'
    response = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert len(error["message"]) < 500
    if message:
        assert error["param"] == constraint.split('"')[1]


def test_an_output_that_exceeds_its_limits_ends_with_a_reason(http: TestClient) -> None:
    body = {"model": "tiny", "prompt": "dog", "max_tokens": 200, "regex": COSTLY_MASK}
    for stream in (False, True):
        response = http.post("/v1/completions", json=body | {"stream": stream})
        assert response.status_code == 200
        assert '"finish_reason":"constraint"' in response.text
        assert '"error"' not in response.text
