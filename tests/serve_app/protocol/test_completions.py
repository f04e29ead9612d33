"""Which request bodies are accepted, and the errors for the others."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from llama_ray.generation.sampling.params import SamplingParams
from serve_app.errors import ApiError, validation_error
from serve_app.protocol.completions import CompletionRequest

BODY = {"model": "m", "prompt": "p"}


def refusal(**fields: Any) -> ApiError:
    """Return the error for a body with these fields."""
    try:
        CompletionRequest.model_validate(BODY | fields).sampling_params()
    except ValidationError as error:
        # FastAPI puts "body" before each location.
        return validation_error([e | {"loc": ("body", *e["loc"])} for e in error.errors()])
    except ApiError as error:
        return error
    raise AssertionError("the body was accepted")


def test_defaults_are_openais() -> None:
    body = CompletionRequest.model_validate(BODY)
    assert body.prompts == ["p"]
    assert (body.echo, body.stream) == (False, False)
    assert body.sampling_params() == SamplingParams(max_tokens=16, temperature=1.0, top_p=1.0, n=1)


def test_every_sampling_field_is_passed_on() -> None:
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
    body = CompletionRequest.model_validate(BODY | fields | {"user": "u", "best_of": 2, "suffix": ""})
    assert body.sampling_params() == SamplingParams(
        **fields | {"stop": ("x",), "logit_bias": {5: -100.0}, "stop_token_ids": (8, 9)}  # type: ignore[arg-type]
    )
    for constraint in ({"json_schema": {"type": "object"}}, {"regex": "a+"}):
        body = CompletionRequest.model_validate(BODY | constraint)
        assert body.sampling_params() == SamplingParams(**constraint)  # type: ignore[arg-type]


def test_null_means_the_default() -> None:
    names = set(CompletionRequest.model_fields) - set(BODY)
    with_nulls = CompletionRequest.model_validate(BODY | dict.fromkeys(names))
    assert with_nulls.sampling_params() == CompletionRequest.model_validate(BODY).sampling_params()


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
def test_a_prompt_is_text_or_token_ids_one_or_several(prompt: object, prompts: object) -> None:
    assert CompletionRequest.model_validate(BODY | {"prompt": prompt}).prompts == prompts


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
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream to be true"),
        ({"prompt": []}, "prompt", "prompt is an empty list"),
        ({"prompt": [1, "a"]}, "prompt", "prompt must be a string, a list of strings"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt", "65 prompts with n 2 are 130 completions"),
        ({"prompt": [[1]] * 129}, "prompt", "prompt has 129 entries; it must have at most 128"),
        ({"prompt": ["a"] * 2_000_000}, "prompt", "prompt has 2,000,000 entries"),
        ({"stop": ["s"] * 129}, "stop", "stop has 129 entries"),
        ({"stop": [1]}, "stop", "stop must be a string or a list of strings"),
        ({"stop": ["s"] * 17}, "stop", "stop has 17 strings; it must have at most 16"),
        ({"stop": ""}, "stop", "a string or several, none of them empty"),
        ({"temperature": "0.5"}, "temperature", "temperature: input should be a valid number"),
        ({"temperature": -0.5}, "temperature", "temperature is -0.5; it must be at least 0"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens is -1; it must be at least 0"),
        ({"n": True}, "n", "n: input should be a valid integer"),
        ({"n": 0}, "n", "n is 0; it must be at least 1"),
        ({"logprobs": 21}, "logprobs", "logprobs is 21; it must be at most 20"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "logit_bias.a: input should be a valid integer"),
        ({"model": None}, "model", "model is required"),
    ],
)
def test_a_bad_field_is_named_with_the_reason(fields: dict[str, Any], param: str, message: str) -> None:
    error = refusal(**fields)
    assert error.status == 400
    body = error.response.model_dump()["error"]
    assert message in body["message"]
    assert body["param"] == param
    assert body["type"] == "invalid_request_error"
    assert set(body) == {"message", "type", "param", "code"}


def test_all_mistakes_of_a_body_are_named_at_once() -> None:
    message = str(refusal(topk=3, temperature="hot"))
    assert "topk" in message
    assert "temperature" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {f"k{i}": 1 for i in range(50_000)}},
        {"logit_bias": {"k" * 100_000: 1}},
        {"prompt": "p", **{f"field{i}": 1 for i in range(10_000)}},
        {"f" * 100_000: 1},
        {"stop": ["s" * 100_000, ""]},
        {"stop_token_ids": ["x"] * 100_000},
        {"prompt": [[1.5] * 100_000]},
        *({name: int("9" * 4000)} for name in ("max_tokens", "min_tokens", "n", "best_of", "top_k", "seed")),
    ],
    ids=lambda fields: "-".join(list(fields)[:2])[:30],
)
def test_an_error_names_a_few_mistakes_and_cuts_what_the_client_sent(fields: dict[str, Any]) -> None:
    error = refusal(**fields).response.error
    assert len(error.message) <= 1000
    assert len(error.param or "") <= 100
    assert "\n" not in error.message


def test_mistakes_beyond_the_first_few_are_counted() -> None:
    message = str(refusal(logit_bias={f"k{i}": 1 for i in range(500)}))
    assert message.startswith("logit_bias.k0: input should be a valid integer; ")
    assert message.endswith("; and 495 more")


@pytest.mark.parametrize(
    "fields",
    [
        {
            "user": "u",
            "safety_identifier": "s",
            "metadata": {"k": "v"},
            "store": True,
            "service_tier": "auto",
            "prompt_cache_key": "k",
            "prompt_cache_retention": "24h",
            "reasoning_effort": "low",
            "verbosity": "low",
            "parallel_tool_calls": False,
        },
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"stream": True, "stream_options": {"include_obfuscation": True}},
    ],
)
def test_fields_of_openai_without_effect_on_the_text_are_accepted(fields: dict[str, Any]) -> None:
    plain = CompletionRequest.model_validate(BODY | {"stream": "stream" in fields}).sampling_params()
    assert CompletionRequest.model_validate(BODY | fields).sampling_params() == plain


@pytest.mark.parametrize("key", ["1.0", " 1", "1 ", "+1", "1_0", "01", "٣", "1e2", "-1", "", "0x1"])
def test_a_key_of_logit_bias_is_a_token_id_in_plain_digits(key: str) -> None:
    assert refusal(logit_bias={key: 1}).response.error.param == "logit_bias"


@pytest.mark.parametrize(
    ("user", "session"), [("u", "u"), ("", None), (None, None), (7, None), ({"id": 1}, None)]
)
def test_a_user_is_the_session_of_a_request(user: object, session: str | None) -> None:
    assert CompletionRequest.model_validate(BODY | {"user": user}).session == session
