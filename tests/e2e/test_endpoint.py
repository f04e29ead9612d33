import socket
from collections.abc import Iterator

import httpx
import openai
import pytest

from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from tests.e2e.conftest import Trained
from tests.e2e.helpers import wait_for


@pytest.fixture(scope="module")
def endpoint(trained: Trained) -> Iterator[str]:
    """The champion that the session trained, served from the registry."""
    from ray import serve

    from serve_app.app import build
    from serve_app.args import ServeArgs

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = ServeArgs.model_validate(
        {"model": "models:/tiny@champion", "tracking_uri": trained.tracking_uri, "num_cpus": 0.5}
    )
    serve.run(build(args), name="champion", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def test_the_trained_champion_answers_over_http(endpoint: str, trained: Trained, tracking: str) -> None:
    wait_for(lambda: httpx.get(f"{endpoint}/ready").status_code == 200)
    client = openai.OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0)
    version = client.models.retrieve("tiny").root
    assert version.startswith("models:/tiny/")

    stream = client.completions.create(
        model="tiny", prompt="import ", max_tokens=20, temperature=0.9, seed=4, stream=True,
        extra_body={"top_k": 30},
    )  # fmt: skip
    streamed = "".join(chunk.choices[0].text for chunk in stream)
    engine = Engine.from_pretrained(version)
    params = SamplingParams(max_tokens=20, temperature=0.9, seed=4, top_k=30)
    assert streamed == engine.generate("import ", params)[0].text
