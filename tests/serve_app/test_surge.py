"""An alias moves to a version that does not fit beside the one that serves, in a real Ray Serve and MLflow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from mlflow import MlflowClient

from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.pretrained import save_pretrained
from llama_ray.tracking.package import CHECKPOINT_PATH
from tests.small_models import random_model, small_config, small_tokenizer

NAME, PATIENCE_S = "large", 60.0
CACHE_BYTES = 2**30
"""Of each engine, which is written only as far as requests need it. There is room for one and the process."""
MEMORY_BYTES = 21 * 2**30 // 10


@pytest.fixture(scope="module")
def versions(store: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directories of two versions; the alias points to the first."""
    client, found, tokenizer = MlflowClient(store), {}, small_tokenizer()
    client.create_registered_model(NAME)
    for number in (1, 2):
        folder = tmp_path_factory.mktemp("version")
        found[f"models:/{NAME}/{number}"] = folder / CHECKPOINT_PATH
        model = random_model(small_config(tokenizer.vocab_size, max_seq_len=8192), seed=number)
        save_pretrained(model, tokenizer, folder / CHECKPOINT_PATH)
        client.create_model_version(NAME, folder.as_uri(), tags={"validation_loss": "1"})
    client.set_registered_model_alias(NAME, "champion", "1")
    return found


@pytest.fixture
def url(served: str, store: str, versions: dict[str, Path]) -> Iterator[str]:
    """The base URL of the application, which is beside that of the other tests."""
    from ray import serve

    from serve_app.app import build
    from serve_app.args import ServeArgs

    args = ServeArgs.model_validate(
        {
            "model": f"models:/{NAME}@champion",
            "tracking_uri": store,
            "registry_poll_s": 0.2,
            "num_cpus": 0.4,
            "memory_bytes": MEMORY_BYTES,
            "kv_cache_memory_bytes": CACHE_BYTES,
            "max_num_seqs": 1024,
            "graceful_shutdown_timeout_s": 20,
        }
    )
    serve.run(build(args), name=NAME, route_prefix=f"/{NAME}")
    yield f"{served}/{NAME}"
    serve.delete(NAME)


class Client(threading.Thread):
    """Asks again and again in a `with` block, and notes the version and the text of each answer."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.answers: list[tuple[str, str]] = []
        self.failures: list[str] = []
        self._url, self._stopped = url, threading.Event()

    def run(self) -> None:
        body = {"model": NAME, "prompt": "The quick", "max_tokens": 100, "seed": 1, "ignore_eos": True}
        with httpx.Client(timeout=PATIENCE_S) as http:
            while not self._stopped.is_set():
                response = http.post(f"{self._url}/v1/completions", json=body)
                if response.is_success:
                    text = response.json()["choices"][0]["text"]
                    self.answers.append((response.headers["x-model-version"], text))
                else:
                    self.failures.append(response.text)

    def __enter__(self) -> Client:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self.join()


def replicas(deployment: str) -> int:
    """How many replicas of the deployment answer requests."""
    from ray import serve

    states = serve.status().applications[NAME].deployments[deployment].replica_states
    return sum(number for state, number in states.items() if str(state) == "RUNNING")


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def cards(url: str) -> dict[str, dict[str, object]]:
    """The metadata of `GET /v1/models`, by name."""
    return {card["id"]: card["metadata"] for card in httpx.get(f"{url}/v1/models").json()["data"]}


def test_new_replicas_serve_until_the_old_ones_have_the_version(
    url: str, store: str, versions: dict[str, Path]
) -> None:
    first, second = versions
    assert (replicas("LlamaReplica"), replicas("LlamaStandby")) == (1, 0)
    reasons = list[object]()

    def serves() -> bool:
        metadata = cards(url).get(second, {})
        reasons.append(metadata.get("reason"))
        return metadata.get("state") == "serving"

    with Client(url) as client:
        eventually(lambda: client.answers, "the first answer")
        MlflowClient(store).set_registered_model_alias(NAME, "champion", "2")
        eventually(serves, f"{second} does not serve")
        assert replicas("LlamaStandby") == 1, reasons
        eventually(lambda: replicas("LlamaStandby") == 0, "the standby does not go")
        assert cards(url).keys() == {NAME, f"{NAME}@champion", second}
        after = len(client.answers)
        eventually(lambda: len(client.answers) > after + 1, "no answer afterwards")

    assert client.failures == []
    assert any(str(reason).startswith(f"does not fit beside {first} (it needs 1.") for reason in reasons)
    answered = [version for version, _ in client.answers]
    assert answered == sorted(answered)
    assert set(answered) == {first, second}
    for version, directory in versions.items():
        engine = Engine.from_pretrained(directory, device="cpu", max_num_seqs=1)
        [want] = engine.generate(["The quick"], SamplingParams(max_tokens=100, seed=1, ignore_eos=True))
        assert {text for answering, text in client.answers if answering == version} == {want.text}
