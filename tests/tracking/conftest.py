"""One SQLite store and one MLflow server for all tests of this folder: creating a schema takes seconds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llama_ray.tracking.runs import Run

ECHO_MODEL = """
import json
from pathlib import Path

import mlflow


class Echo(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.config = json.loads(Path(context.artifacts["checkpoint"], "config.json").read_text())

    def predict(self, context, model_input: list[str], params=None) -> list[str]:
        kind = self.config["model_type"]
        return [f"{kind}:{text}:{params['max_tokens']}:{params['top_p']}" for text in model_input]


mlflow.models.set_model(Echo())
"""


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of an SQLite store that this test session alone uses."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real MLflow server that stores and serves artifacts itself."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "--backend-store-uri": f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination": f"{folder}/artifacts",
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *(word for pair in options.items() for word in pair)],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail((folder / "log").read_text())
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture
def new_run(store: str) -> Callable[..., Run]:
    """Creates runs in the session's store."""

    def create(**changes: object) -> Run:
        options = {"params": {}, "tags": {}, "description": "", "uri": store}
        return Run.create(**{"experiment": "tests", "name": "a run", **options, **changes})  # type: ignore[arg-type]

    return create


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files of a Hugging Face LLaMA, weights in two shards."""
    folder = tmp_path_factory.mktemp("hf") / "step_000100"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    for shard in (1, 2):
        save_file(
            {f"w{shard}": torch.full((256,), shard)}, folder / f"model-{shard:05d}-of-00002.safetensors"
        )
    return folder


@pytest.fixture(scope="session")
def echo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models-from-code file that answers with its input, its parameters and the checkpoint's model type."""
    file = tmp_path_factory.mktemp("code") / "echo_model.py"
    file.write_text(ECHO_MODEL)
    return file
