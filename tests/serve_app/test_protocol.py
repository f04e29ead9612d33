"""What a request may hold, and what is said about one that may not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from llama_ray.generation.sampling.params import SamplingParams
from serve_app.protocol import ApiError, CompletionRequest, validation_error

BODY = {"model": "m", "prompt": "p"}


def refusal(**fields: Any) -> ApiError:
    """The error that a body with these fields is answered with."""
    try:
        CompletionRequest.model_validate(BODY | fields).job()
    except ValidationError as e:  # FastAPI puts "body" before each place
        return validation_error([error | {"loc": ("body", *error["loc"])} for error in e.errors()])
    except ApiError as e:
        return e
    raise AssertionError("the body was accepted")


def test_defaults_are_openais() -> None:
    job = CompletionRequest.model_validate(BODY).job()
    assert job.prompts == ["p"]
    assert (job.echo, job.stream) == (False, False)
    assert job.params == SamplingParams(max_tokens=16, temperature=1.0, top_p=1.0, n=1)


def test_every_sampling_field_arrives() -> None:
    fields = {
        "max_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "n": 2,
        "stop": "x",
        "seed": 3,
        "logprobs": 4,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"5": -100},
        "top_k": 6,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "min_tokens": 2,
        "stop_token_ids": [8, 9],
    }
    job = CompletionRequest.model_validate(BODY | fields | {"user": "u", "best_of": 2, "suffix": ""}).job()
    assert job.params == SamplingParams(
        **fields | {"stop": ("x",), "logit_bias": {5: -100.0}, "stop_token_ids": (8, 9)}  # type: ignore[arg-type]
    )
    for constraint in ({"json_schema": {"type": "object"}}, {"regex": "a+"}):
        job = CompletionRequest.model_validate(BODY | constraint).job()
        assert job.params == SamplingParams(**constraint)  # type: ignore[arg-type]


def test_null_means_the_default() -> None:
    names = set(CompletionRequest.model_fields) - set(BODY)
    with_nulls = CompletionRequest.model_validate(BODY | dict.fromkeys(names))
    assert with_nulls.job() == CompletionRequest.model_validate(BODY).job()


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_forms_of_a_prompt(prompt: object, prompts: object) -> None:
    assert CompletionRequest.model_validate(BODY | {"prompt": prompt}).job().prompts == prompts


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"topk": 3}, "topk", "topk is not a field that this server knows; leave it out"),
        (
            {"stream": True, "stream_options": {"chunk": 1}},
            "stream_options",
            "stream_options.chunk is not a field",
        ),
        ({"suffix": "end"}, "suffix", "suffix is not supported"),
        ({"best_of": 3}, "best_of", "best_of 3 is not supported; leave it out, or set it to n (1)"),
        ({"echo": True, "logprobs": 1}, "echo", "log-probabilities of the prompt are not computed"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream to be true"),
        ({"prompt": []}, "prompt", "prompt is an empty list"),
        ({"prompt": [1, "a"]}, "prompt", "prompt must be a string, a list of strings"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt", "65 prompts with n 2 are 130 completions"),
        ({"stop": [1]}, "stop", "stop must be a string or a list of strings"),
        ({"stop": ["s"] * 17}, "stop", "stop has 17 strings; it may have 16"),
        ({"stop": ""}, "stop", "strings that are not empty"),
        ({"temperature": "0.5"}, "temperature", "temperature: input should be a valid number"),
        ({"temperature": -0.5}, "temperature", "temperature is -0.5; it must be 0 (greedy) or above"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be at least 1"),
        ({"n": True}, "n", "n: input should be a valid integer"),
        ({"n": 0}, "n", "n is 0; it must be 1 to 128"),
        ({"logprobs": 21}, "logprobs", "logprobs is 21; it must be 0 to 20"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "logit_bias.a: input should be a valid integer"),
        ({"model": None}, "model", "model is required"),
    ],
)
def test_a_refusal_says_what_and_why(fields: dict[str, Any], param: str, message: str) -> None:
    error = refusal(**fields)
    assert error.status == 400
    body = error.response.model_dump()["error"]
    assert message in body["message"]
    assert body["param"] == param
    assert body["type"] == "invalid_request_error"
    assert set(body) == {"message", "type", "param", "code"}


def test_all_mistakes_are_named_at_once() -> None:
    message = str(refusal(topk=3, temperature="hot"))
    assert "topk" in message
    assert "temperature" in message
