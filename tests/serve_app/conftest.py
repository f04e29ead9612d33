"""A small model in a directory, the same model behind a real Ray Serve instance, and a client for it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.engine import Engine
from llama_ray.generation.stats import EngineStats
from llama_ray.model.stored_config import load_config
from tests.generation.adapters.helpers import save_random_adapter
from tests.serve_app.helpers import ADAPTERS, LOUD_TEMPLATE, MAX_QUEUED, save_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_model(directory)
    return directory


@pytest.fixture(scope="session")
def adapter_dirs(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of the model by name, `loud` with a chat template of its own, and one of another model."""
    root, config = tmp_path_factory.mktemp("adapters"), load_config(model_dir)
    directories = {name: save_random_adapter(root / name, config, seed) for seed, name in enumerate(ADAPTERS)}
    Tokenizer.load(model_dir).save(directories["loud"])
    (directories["loud"] / "chat_template.jinja").write_text(LOUD_TEMPLATE)
    other = save_random_adapter(root / "other", config, 9, base_weights="0123456789abcdef")
    return {**directories, "other": other}


@pytest.fixture(scope="session")
def engine(model_dir: Path) -> Engine:
    """The served model in this process: the reference for what HTTP answers."""
    return Engine.from_pretrained(model_dir, device="cpu", max_num_seqs=8)


@pytest.fixture(scope="package")
def serve_url(ray_cluster: str) -> Iterator[str]:
    """The URL of a Ray Serve instance that all applications of the tests share."""
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="package")
def served(serve_url: str, model_dir: Path, adapter_dirs: dict[str, Path]) -> str:
    """The base URL of the application, which serves the directory."""
    from ray import serve

    from serve_app.app import ServeArgs, build

    args = ServeArgs(
        model=str(model_dir),
        adapters={name: str(directory) for name, directory in adapter_dirs.items()},
        num_cpus=0.5,
        max_replicas=1,
        max_num_seqs=8,
        max_queued_requests=MAX_QUEUED,
        # Nothing is left to drain at the end of the tests.
        graceful_shutdown_timeout_s=0.1,
    )
    serve.run(build(args), name="llama-ray", route_prefix="/")
    return serve_url


@pytest.fixture
def client(served: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def stats(served: str) -> Callable[[], EngineStats]:
    """A function that returns what the served engine is doing."""
    from ray import serve

    handle = serve.get_deployment_handle("LlamaReplica", "llama-ray")

    def ask() -> EngineStats:
        [stats] = handle.stats.remote().result(timeout_s=10).values()
        assert isinstance(stats, EngineStats)
        return stats

    return ask


@pytest.fixture
def become_idle(stats: Callable[[], EngineStats]) -> Callable[[], bool]:
    """A function that waits, at most 10 s, until the served engine has nothing to do, and returns whether it has."""

    def wait() -> bool:
        deadline = time.monotonic() + 10
        while (now := stats()).running or now.waiting:
            if time.monotonic() > deadline:
                return False
        return True

    return wait
