"""A small model in a directory, the same model behind a real Ray Serve instance, and a client for it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import torch

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.generation.engine import Engine
from llama_ray.generation.stats import EngineStats
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.pretrained import save_pretrained

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
]
EMOJI = "🙂"
MAX_SEQ_LEN = 4096
MAX_QUEUED = 32  # requests that wait for the served replica beside the 16 that it gets at once


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose next token is open, except that an emoji is always followed by another, in four tokens."""
    tokenizer = Tokenizer.train(iter(TEXTS * 5), 320)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=96,
        max_seq_len=MAX_SEQ_LEN,
    )
    model = Llama(config, seed=1)
    chain = tokenizer.encode(EMOJI)
    assert len(chain) == 4
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
        # The last four dimensions of the hidden state say which byte of the emoji was there; no layer writes to them.
        model.embed_tokens.weight[:, -4:] = 0
        model.lm_head.weight[:, -4:] = 0
        for layer in model.layers:
            layer.self_attn.o_proj.weight[-4:] = 0
            layer.mlp.down_proj.weight[-4:] = 0
        for i, token in enumerate(chain):
            model.embed_tokens.weight[token, i - 4] = 100
            model.lm_head.weight[chain[(i + 1) % 4], i - 4] = 100
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_pretrained(model, tokenizer, directory)
    return directory


@pytest.fixture(scope="session")
def engine(model_dir: Path) -> Engine:
    """What is served, in this process: the reference for what HTTP answers."""
    return Engine.from_pretrained(model_dir, device="cpu", max_num_seqs=8)


@pytest.fixture(scope="package")
def served(ray_cluster: str, model_dir: Path) -> Iterator[str]:
    """The base URL of the application, which serves the directory."""
    from ray import serve

    from serve_app.app import ServeArgs, build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = ServeArgs(
        model=str(model_dir), num_cpus=0.5, max_replicas=1, max_num_seqs=8, max_queued_requests=MAX_QUEUED
    )
    serve.run(build(args), name="llama-ray", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture
def client(served: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def stats(served: str) -> Callable[[], EngineStats]:
    """What the served engine is doing, now."""
    from ray import serve

    handle = serve.get_deployment_handle("LlamaReplica", "llama-ray")
    return lambda: handle.stats.remote().result(timeout_s=10)  # type: ignore[no-any-return]


@pytest.fixture
def become_idle(stats: Callable[[], EngineStats]) -> Callable[[], bool]:
    """Wait until the engine has nothing to do, 10 s at most -> whether it has."""

    def wait() -> bool:
        deadline = time.monotonic() + 10
        while (now := stats()).running or now.waiting:
            if time.monotonic() > deadline:
                return False
        return True

    return wait
