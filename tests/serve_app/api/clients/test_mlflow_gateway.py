"""MLflow's AI gateway in front of the application, asked by OpenAI's client, and for completions by its raw proxy."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from llama_ray.generation.engine import Engine
from tests.serve_app.api.clients.helpers import KEY, MAX_TOKENS, MESSAGES, PROMPT, answer, completion

NAME = "behind-mlflow"


@pytest.fixture(scope="module")
def gateway(server: str, endpoint: str) -> str:
    """The URL of a gateway whose endpoint NAME is the application."""

    def create(what: str, **fields: Any) -> Any:
        response = httpx.post(f"{server}/api/3.0/mlflow/gateway/{what}/create", json=fields)
        assert response.status_code == 200, response.text
        [created] = response.json().values()
        return created

    secret = create(
        "secrets",
        secret_name="key",
        secret_value={"api_key": KEY},
        provider="openai",
        auth_config={"api_base": f"{endpoint}/v1"},
    )
    model = create(
        "model-definitions",
        name="tiny",
        secret_id=secret["secret_id"],
        provider="openai",
        model_name="tiny",
    )
    link = {
        "model_definition_id": model["model_definition_id"],
        "linkage_type": "PRIMARY",
        "weight": 1.0,
    }
    create("endpoints", name=NAME, model_configs=[link], usage_tracking=False)
    return f"{server}/gateway"


@pytest.mark.parametrize("path", ["mlflow/v1", "openai/v1"])
def test_conversations_pass_the_gateway(gateway: str, reference: Engine, path: str) -> None:
    want = answer(reference)
    with openai.OpenAI(base_url=f"{gateway}/{path}", api_key="none", max_retries=0) as client:

        def ask(**options: Any) -> Any:
            return client.chat.completions.create(
                model=NAME, messages=MESSAGES, temperature=0, max_tokens=MAX_TOKENS, **options
            )

        got = ask()
        assert got.choices[0].message.content == want.text
        assert got.choices[0].finish_reason == want.finish_reason
        assert got.usage.completion_tokens == len(want.token_ids)
        parts = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True) if chunk.choices]
        assert "".join(parts) == want.text


def test_completions_pass_its_raw_proxy(gateway: str, reference: Engine) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": MAX_TOKENS}
    response = httpx.post(f"{gateway}/proxy/{NAME}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == completion(reference).text
