"""A real instruct model, SmolLM2 135M, from the package index: registered with its chat template, it answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from fastapi.testclient import TestClient

from llama_ray.orchestration.publish import publish
from llama_ray.pretrained import load_pretrained, save_pretrained
from llama_ray.storage.run_directory import MARKER
from llama_ray.tracking.runs import Run
from serve_app.api.api import create_api
from serve_app.registry.messages import ModelVersion
from serve_app.replica.loader import EngineLoader
from tests.serve_app.helpers import FixedFollower, LocalReplicas, local_client, table_of

QUESTION = {"role": "user", "content": "What is the capital of France?"}


@pytest.fixture(scope="module")
def client(smollm2: Path, store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of the version that was registered."""
    trained = tmp_path_factory.mktemp("trained")
    save_pretrained(*load_pretrained(smollm2, dtype=torch.bfloat16), trained)
    files = {"model.safetensors": {"bytes": 1, "sha256": "ab"}}
    (trained / MARKER).write_text(json.dumps({"step": 1, "files": files}))
    run = Run.create(experiment="tests", name="smollm2", params={}, tags={}, description="", uri=store)
    version, _ = publish(
        run,
        trained,
        name="smollm2",
        precision="bf16",
        policy="always",
        validation_loss=2.0,
        data_fingerprint="smol",
        tags={},
        description="",
    )
    ref = f"models:/smollm2/{version.version}"
    model = EngineLoader(tracking_uri=store).fetch(ModelVersion("smollm2", ref, ref)).model
    replicas = LocalReplicas(model, max_seq_len=1024, kv_cache_memory_bytes=2**27)
    api = create_api(lambda: local_client(FixedFollower(table_of(model)), replicas))
    with TestClient(api) as http:
        yield openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http)
    replicas.stop()


def test_it_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    [card] = client.models.list().data
    assert card.model_extra is not None
    assert card.model_extra["metadata"]["chat_template"] == "from the checkpoint"
    answer = client.chat.completions.create(model=card.id, messages=[QUESTION], temperature=0)  # type: ignore[list-item]
    assert "Paris" in (answer.choices[0].message.content or "")
    # It ends by itself, with the token that its template ends a turn with.
    assert answer.choices[0].finish_reason == "stop"
    response = client.responses.create(model=card.id, input=QUESTION["content"], temperature=0)
    assert response.output_text == answer.choices[0].message.content
