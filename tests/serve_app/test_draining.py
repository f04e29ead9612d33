"""Redeployed, scaled down, deleted: nothing that was asked is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from llama_ray.generation.engine import Engine
from tests.serve_app.helpers import expected

Deploy = Callable[..., None]


@pytest.fixture(scope="module")
def url(served: str) -> str:
    return f"{served}/draining"


@pytest.fixture(scope="module")
def deploy(url: str, model_dir: Path) -> Iterator[Deploy]:
    """Deploys an application, or again with other arguments, and waits until it is as they say."""
    from ray import serve

    from serve_app.app import build
    from serve_app.args import ServeArgs

    def run(replicas: int, **args: Any) -> None:
        limits = {f"{which}_{kind}replicas": replicas for which in ("min", "max") for kind in ("", "api_")}
        arguments = ServeArgs.model_validate({"model": str(model_dir), "num_cpus": 0.5} | limits | args)
        serve.run(build(arguments), name="draining", route_prefix="/draining")

    yield run
    serve.delete("draining")


def test_a_redeploy_and_fewer_replicas_lose_nothing(deploy: Deploy, url: str, engine: Engine) -> None:
    deploy(replicas=1, max_num_seqs=8)
    first = actors()
    with asking(url, clients=2) as texts:
        deploy(replicas=2, max_num_seqs=4)
        wait_until(lambda: not first & actors())
        deploy(replicas=1, max_num_seqs=4)
        wait_until(lambda: len(actors()) == 2)
    assert set(texts) == {text(engine, 500)}
    assert len(texts) > 4


def test_a_deleted_application_ends_its_streams(deploy: Deploy, url: str, engine: Engine) -> None:
    from ray import serve

    deploy(replicas=1, max_num_seqs=4)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = ask(client, 3000)
        began = next(stream)
        deleted = ThreadPoolExecutor(1).submit(serve.delete, "draining")
        wait_until(lambda: httpx.get(f"{url}/health").status_code != 200)
        assert began + "".join(stream) == text(engine, 3000)
    deleted.result()


@contextmanager
def asking(url: str, clients: int) -> Iterator[list[str]]:
    """Let clients stream one answer after the other, and return the texts; an error is raised at the end."""
    texts: list[str] = []
    end = threading.Event()

    def client() -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            while not end.is_set():
                texts.append("".join(ask(client, 500)))

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
        try:
            yield texts
        finally:
            end.set()
        for future in running:
            future.result()


def ask(client: openai.OpenAI, max_tokens: int) -> Iterator[str]:
    """The pieces of a streamed answer."""
    chunks = client.completions.create(
        model="tiny", prompt="dog", max_tokens=max_tokens, seed=7, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    return (chunk.choices[0].text for chunk in chunks)


def text(engine: Engine, max_tokens: int) -> str:
    """What all pieces must join to."""
    return expected(engine, "dog", max_tokens=max_tokens, seed=7, ignore_eos=True)[0].text


def actors() -> set[str]:
    """The names of the replicas' actors, but for the follower's."""
    import ray.util

    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    return {name for name in names if "draining#" in name and "Follower" not in name}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
