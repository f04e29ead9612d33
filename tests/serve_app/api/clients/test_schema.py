"""Every operation of `GET /openapi.json`, asked for what its schema allows and for what it does not.

The server has no error of its own, and statuses and bodies are those that the schema has.
`tests/serve_app/api/test_odd_bodies.py` has values of which no schema knows.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

EXAMPLES = 30
"""Requests for each operation and mode."""
CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
LIMITS = {
    "/v1/completions": "max_tokens",
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/responses": "max_output_tokens",
}
"""What keeps texts short."""


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
def test_every_operation_answers_as_its_schema_says(endpoint: str, key: str, mode: GenerationMode) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    schema = schemathesis.openapi.from_url(f"{endpoint}/openapi.json", headers=headers)
    statuses = Counter[int]()
    with requests.Session() as session:
        session.headers.update(headers)
        for operation in schema.get_all_operations():
            statuses += ask(session, operation.ok(), mode)
    assert min(statuses[200], statuses[400]) > EXAMPLES // 2


def ask(session: requests.Session, operation: Any, mode: GenerationMode) -> Counter[int]:
    """Send requests to one operation and check the responses; return how many had which status."""
    statuses = Counter[int]()

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        _make_likelier(case)
        response = case.call(session=session)
        case.validate_response(response, checks=CHECKS)
        statuses[response.status_code] += 1

    try:
        send()
    except Unsatisfiable:
        # An operation without parameters has nothing that could be wrong.
        assert mode is GenerationMode.NEGATIVE
    return statuses


def _make_likelier(case: Any) -> None:
    """Ask for the model that there is, and for a short text, where the rest of a body may be right."""
    if isinstance(case.body, dict):
        if "model" in case.body:
            case.body["model"] = "tiny"
        if case.operation.path in LIMITS:
            case.body[LIMITS[case.operation.path]] = 2
