"""The HTTP application around a replica in this process: what happens when the model fails."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from llama_ray.data.tokenizer import Tokenizer
from serve_app.api.api import create_api
from serve_app.errors import INTERNAL_ERROR
from tests.generation.constraints.helpers import COSTLY_MASK
from tests.serve_app.helpers import MAX_SEQ_LEN, LocalModel

# A text that the engine is still writing when its first part has arrived.
BODY = {"model": "tiny", "prompt": "dog", "max_tokens": MAX_SEQ_LEN - 100, "ignore_eos": True}


@pytest.fixture
def model(model_dir: Path) -> Iterator[LocalModel]:
    local = LocalModel(model_dir)
    yield local
    local.replica.stop()


@pytest.fixture
def http(model: LocalModel) -> TestClient:
    return TestClient(create_api(model), raise_server_exceptions=False)


def test_an_error_after_the_first_byte_is_an_event(model: LocalModel, http: TestClient) -> None:
    model.dies = True
    response = http.post("/v1/completions", json=BODY | {"stream": True})
    assert response.status_code == 200
    first, *_, error, done, empty = response.text.split("\n\n")
    assert json.loads(first.removeprefix("data: "))["choices"]
    error = json.loads(error.removeprefix("data: "))["error"]
    assert error["code"] == "generation_failed"
    assert "stopped" in error["message"]
    assert (done, empty) == ("data: [DONE]", "")


def test_an_error_before_the_first_byte_has_a_status(model: LocalModel, http: TestClient) -> None:
    model.replica.stop()
    for stream in (False, True):
        response = http.post("/v1/completions", json=BODY | {"stream": stream})
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"


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


def test_health_is_503_if_the_model_does_not_answer(http: TestClient) -> None:
    response = http.get("/health")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "no model replica is running"
    assert response.headers["retry-after"] == "5"


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
    found: list[int] = []

    async def receive() -> dict[str, object]:
        chunk = next(chunks, None)
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            found.append(message["status"])

    headers = [(b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": headers,
        "query_string": b"",
    }
    await app(scope, receive, send)
    return found


def test_a_body_beyond_the_limit_is_a_413_however_it_is_sent(model: LocalModel) -> None:
    app = create_api(model, max_body_bytes=1000)
    response = TestClient(app).post("/v1/completions", json=BODY | {"prompt": "a" * 1000})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert "1,000 bytes" in response.json()["error"]["message"]
    endless = itertools.repeat(b"x" * 100)
    assert asyncio.run(statuses(app, endless)) == [413]
    body = json.dumps(BODY | {"max_tokens": 1}).encode()
    assert asyncio.run(statuses(app, iter([body[:9], body[9:]]))) == [200]


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
