"""Evaluations of the endpoint: the numbers are those of the model, or there are none."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llama_ray.evaluation.endpoint import EndpointScorer
from llama_ray.evaluation.engine_scorer import EngineScorer
from llama_ray.evaluation.results import EvaluationError
from llama_ray.evaluation.scoring import Generation, Scoring
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from tests.serve_app.api.clients.helpers import KEY


@pytest.fixture
def remote(endpoint: str, reference: Engine) -> EndpointScorer:
    assert reference.tokenizer is not None
    return EndpointScorer("tiny", f"{endpoint}/v1", reference.tokenizer, api_key=KEY, concurrency=4)


def test_log_probabilities_are_those_of_the_engine(remote: EndpointScorer, reference: Engine) -> None:
    rng = random.Random(0)
    lengths = (2, 9, 40, remote.max_seq_len + 1)
    tokens = [tuple(rng.randrange(200) for _ in range(length)) for length in lengths]
    requests = [Scoring(each, start) for each in tokens for start in (1, len(each) - 1)]
    for got, want in zip(remote.score(requests), EngineScorer("m", reference).score(requests), strict=True):
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-5)
        assert got.greedy == want.greedy


def test_texts_are_those_of_the_engine(remote: EndpointScorer, reference: Engine) -> None:
    params = [
        SamplingParams(max_tokens=12, temperature=0, stop=("o",)),
        SamplingParams(max_tokens=12, temperature=0.9, top_k=5, min_p=0.01, repetition_penalty=1.2, seed=3),
    ]
    requests = [Generation((60, 70, 80), each) for each in params]
    assert remote.generate(requests) == EngineScorer("m", reference).generate(requests)


@pytest.mark.parametrize(
    ("model", "key", "message"),
    [("other", KEY, "no model 'other'; give one of tiny"), ("tiny", None, "answered 401")],
)
def test_what_the_endpoint_refuses_is_one_line(
    endpoint: str, reference: Engine, model: str, key: str | None, message: str
) -> None:
    assert reference.tokenizer is not None
    with pytest.raises(EvaluationError, match=message) as error:
        EndpointScorer(model, f"{endpoint}/v1", reference.tokenizer, api_key=key)
    assert "\n" not in str(error.value)


@contextmanager
def ignoring(logprobs: object) -> Iterator[str]:
    """An endpoint that ignores echo, as llama.cpp's server does (ggml-org/llama.cpp#27174), or reports otherwise."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": "tiny", "max_model_len": 100}]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._send({"choices": [{"text": "a", "logprobs": logprobs}]})

        def _send(self, answer: object) -> None:
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "logprobs",
    [None, {"token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}]}, {"content": [{"logprob": -1.0}]}],
    ids=["none", "of the answer alone", "of another form"],
)
def test_an_endpoint_that_ignores_echo_gets_no_scores(reference: Engine, logprobs: object) -> None:
    assert reference.tokenizer is not None
    with (
        ignoring(logprobs) as url,
        pytest.raises(EvaluationError, match="does not report the log-probabilities of a prompt"),
    ):
        EndpointScorer("tiny", url, reference.tokenizer)


def test_an_address_where_nobody_answers_is_told_at_once(reference: Engine) -> None:
    assert reference.tokenizer is not None
    with pytest.raises(EvaluationError, match=r"no answer from tiny at http://127\.0\.0\.1:9/v1"):
        EndpointScorer("tiny", "http://127.0.0.1:9/v1", reference.tokenizer)
