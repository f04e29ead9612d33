"""The application as clients reach it: it listens on a port, and asks for a key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from llama_ray.generation.engine import Engine
from serve_app.api.access import digest
from serve_app.api.api import HttpOptions, create_api
from tests.serve_app.api.clients.helpers import KEY
from tests.serve_app.api.clients.listening import listening
from tests.serve_app.helpers import FixedFollower, LocalReplicas, local_client, table_of


@pytest.fixture(scope="package")
def endpoint(tuned_dir: Path) -> Iterator[str]:
    """The URL of the application around the small model with a chat template, which is called tiny."""
    replicas, follower = LocalReplicas(tuned_dir), FixedFollower(table_of(tuned_dir))
    options = HttpOptions(key_digests=(digest(KEY),))
    with listening(create_api(lambda: local_client(follower, replicas), options)) as url:
        yield url
    replicas.stop()


@pytest.fixture(scope="package")
def reference(tuned_dir: Path) -> Engine:
    """The same model without HTTP."""
    return Engine.from_pretrained(tuned_dir, device="cpu")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    """The key, also where most clients look for it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return KEY


@pytest.fixture
def client(endpoint: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{endpoint}/v1", max_retries=0) as client:
        yield client
