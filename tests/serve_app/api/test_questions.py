"""Tokens, scores and embeddings of texts, compared to the tokenizer and the model themselves."""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.engine import Engine
from llama_ray.model.llama import Llama
from llama_ray.pretrained import load_pretrained
from serve_app.api.api import create_api
from tests.serve_app.helpers import EMOJI, MAX_SEQ_LEN, FixedFollower, LocalReplicas, local_client, table_of

TEXT = f"The quick brown fox {EMOJI}"


@pytest.fixture(scope="module")
def http(model_dir: Path) -> Iterator[TestClient]:
    replicas, follower = LocalReplicas(model_dir), FixedFollower(table_of(model_dir))
    with TestClient(create_api(lambda: local_client(follower, replicas))) as http:
        yield http
    replicas.stop()


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> tuple[Llama, Tokenizer]:
    model, tokenizer = load_pretrained(model_dir)
    assert tokenizer is not None
    return model, tokenizer


def logprobs(model: Llama, ids: list[int]) -> list[float]:
    """The natural log-probability of each token but the first."""
    with torch.inference_mode():
        rows = model(torch.tensor([ids]))[0].float().log_softmax(dim=-1)
    return [float(rows[i, token]) for i, token in enumerate(ids[1:])]


def test_tokens_are_the_tokenizers_and_turn_back_into_the_text(
    http: TestClient, loaded: tuple[Llama, Tokenizer]
) -> None:
    _, tokenizer = loaded
    body = {"prompt": TEXT, "add_special_tokens": False, "return_token_strs": True}
    got = http.post("/tokenize", json=body).json()
    assert got["tokens"] == tokenizer.encode(TEXT)
    assert got["count"] == len(got["tokens"]) == len(got["token_strs"])
    assert got["max_model_len"] == MAX_SEQ_LEN
    assert http.post("/detokenize", json={"tokens": got["tokens"]}).json() == {"prompt": TEXT}
    whole = http.post("/tokenize", json={"model": "tiny", "prompt": TEXT}).json()
    assert whole["tokens"] == tokenizer.encode_prompt(TEXT)


def test_special_tokens_are_named_and_parsed(http: TestClient, loaded: tuple[Llama, Tokenizer]) -> None:
    _, tokenizer = loaded
    response = http.get("/tokenizer_info")
    assert response.headers["x-model-version"] == "tiny"
    eos = response.json()["eos_token"]
    got = http.post("/tokenize", json={"prompt": f"a{eos}", "add_special_tokens": False}).json()["tokens"]
    assert got == [*tokenizer.encode("a"), tokenizer.eos_id]
    assert http.post("/detokenize", json={"tokens": got}).json()["prompt"] == f"a{eos}"


def test_a_score_is_what_the_model_says_of_the_text(
    http: TestClient, loaded: tuple[Llama, Tokenizer]
) -> None:
    model, tokenizer = loaded
    response = http.post("/v1/score", json={"model": "tiny", "input": [TEXT, "dog"]})
    for text, score in zip([TEXT, "dog"], response.json()["data"], strict=True):
        ids = tokenizer.encode_prompt(text)
        want = logprobs(model, ids)
        known = [value for value in score["token_logprobs"] if value is not None]
        assert score["token_ids"] == ids[len(ids) - len(score["token_ids"]) :]
        assert known == pytest.approx(want[len(want) - len(known) :], abs=1e-4)
        assert score["loss"] == pytest.approx(-sum(known) / len(known))
        lost = tokenizer.decode(score["token_ids"][: len(score["token_ids"]) - len(known)])
        scored_bytes = len(text.encode()) - len(lost.encode())
        assert score["bits_per_byte"] == pytest.approx(-sum(known) / math.log(2) / scored_bytes)
        assert "".join(score["tokens"]).startswith(text[:3])
    assert response.json()["usage"]["completion_tokens"] == 0


def test_continuations_are_scored_after_their_context(
    http: TestClient, loaded: tuple[Llama, Tokenizer], engine: Engine
) -> None:
    model, tokenizer = loaded
    [greedy] = engine.generate(["The quick"], None)
    body = {"model": "tiny", "context": "The quick", "input": [" brown", " dog"]}
    for text, score in zip(body["input"], http.post("/v1/score", json=body).json()["data"], strict=True):
        ids = tokenizer.encode_prompt("The quick" + text)
        want = logprobs(model, ids)[-len(score["token_ids"]) :]
        assert score["token_logprobs"] == pytest.approx(want, abs=1e-4)
        assert score["logprob"] == pytest.approx(sum(want), abs=1e-3)
        assert "".join(score["tokens"]) == text
    assert greedy


def test_what_the_model_would_write_is_greedy(http: TestClient, engine: Engine) -> None:
    # After an emoji the model always writes another one.
    body = {"model": "tiny", "context": EMOJI, "input": [EMOJI, "a"]}
    first, second = http.post("/v1/score", json=body).json()["data"]
    assert (first["is_greedy"], second["is_greedy"]) == (True, False)


def test_embeddings_are_the_engines_in_both_encodings(http: TestClient, engine: Engine) -> None:
    body = {"model": "tiny", "input": [TEXT, "dog"]}
    floats = http.post("/v1/embeddings", json=body).json()
    packed = http.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()
    for text, plain, coded in zip(body["input"], floats["data"], packed["data"], strict=True):
        assert plain["embedding"] == pytest.approx(engine.embed(text), abs=1e-5)
        unpacked = array("f", base64.b64decode(coded["embedding"]))
        assert list(unpacked) == pytest.approx(plain["embedding"], abs=1e-5)
    assert floats["usage"]["prompt_tokens"] == floats["usage"]["total_tokens"] > 0


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "prompt is required"),
        ("/tokenize", {"prompt": "a", "model": "gpt"}, "'gpt' is not served here"),
        ("/detokenize", {"tokens": [10**6]}, "tokens has 1000000; a token id must be from 0"),
        ("/detokenize", {"tokens": [1] * (MAX_SEQ_LEN + 1)}, "tokens has 4,097 ids; it must have at most"),
        ("/v1/score", {"model": "tiny", "input": []}, "input is empty"),
        ("/v1/score", {"model": "tiny", "input": "a b " * MAX_SEQ_LEN}, "shorten the prompt"),
        ("/v1/embeddings", {"model": "tiny", "input": "a", "dimensions": 5}, "dimensions is not supported"),
        ("/v1/embeddings", {"model": "tiny", "input": [[]]}, "prompt"),
    ],
)
def test_a_question_that_cannot_be_answered_says_why(
    http: TestClient, path: str, body: dict[str, object], message: str
) -> None:
    response = http.post(path, json=body)
    assert response.status_code in (400, 404)
    assert message in response.json()["error"]["message"]
