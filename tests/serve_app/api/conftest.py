"""A model with a chat template of its own, behind the HTTP application in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from serve_app.api.api import create_api
from tests.data.chat_templates import ZEPHYR
from tests.serve_app.helpers import FixedFollower, LocalReplicas, local_client, table_of


@pytest.fixture(scope="session")
def tuned_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a template in which eos ends every message."""
    directory = tmp_path_factory.mktemp("tuned") / "tiny"
    shutil.copytree(model_dir, directory)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": ZEPHYR}))
    return directory


@pytest.fixture(scope="module")
def tuned_replicas(tuned_dir: Path) -> Iterator[LocalReplicas]:
    replicas = LocalReplicas(tuned_dir, 2)
    yield replicas
    replicas.stop()


@pytest.fixture
def tuned(tuned_dir: Path, tuned_replicas: LocalReplicas) -> Iterator[TestClient]:
    api = create_api(lambda: local_client(FixedFollower(table_of(tuned_dir)), tuned_replicas))
    with TestClient(api, raise_server_exceptions=False) as http:
        yield http
