"""Versions in the SQLite store that all tests share: each registers models of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mlflow import MlflowClient


@pytest.fixture(scope="session")
def client(store: str) -> MlflowClient:
    """A client of the store."""
    return MlflowClient(store)


@pytest.fixture
def register(client: MlflowClient) -> Callable[..., None]:
    """Registers versions without weights: `count` of them, with the validation loss 2.0."""

    def register_versions(name: str, count: int) -> None:
        client.create_registered_model(name)
        for _ in range(count):
            client.create_model_version(name, "file:///nowhere", tags={"validation_loss": "2.0"})

    return register_versions
