"""OpenAI's way to ask for JSON, in the body of any request for text."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.errors import ApiError
from serve_app.protocol.completions import CompletionRequest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def request(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "tiny", "prompt": "a", **fields})


@pytest.mark.parametrize(
    ("format", "schema"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}, SCHEMA),
        ({"type": "json_schema", "json_schema": {"name": "n", "strict": None}}, {"type": "object"}),
    ],
)
def test_a_format_becomes_a_schema(format: object, schema: object) -> None:
    assert request(response_format=format).sampling_params().json_schema == schema


@pytest.mark.parametrize(
    "format",
    [
        "json_object",
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_object", "json_schema": {"name": "n"}},
        {"type": "json_schema", "json_schema": {"schema": "a"}},
    ],
)
def test_what_is_no_format_is_refused(format: object) -> None:
    with pytest.raises(ValidationError) as caught:
        request(response_format=format)
    assert {error["loc"][0] for error in caught.value.errors()} == {"response_format"}


@pytest.mark.parametrize("other", [{"regex": "a"}, {"json_schema": SCHEMA}])
def test_a_format_beside_another_constraint_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="response_format asks for JSON beside") as caught:
        request(response_format={"type": "json_object"}, **other).sampling_params()
    assert caught.value.response.error.param == "response_format"
