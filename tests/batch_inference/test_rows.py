from __future__ import annotations

from typing import Any

import pytest

from llama_ray.batch_inference.partitions import Line
from llama_ray.batch_inference.rows import RowError, adapter_of, params_of, parse, prompt_of
from llama_ray.generation.sampling.params import SamplingParams

BASE = SamplingParams(max_tokens=7, top_k=3, stop=("x",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "x"', "f:7 is not JSON"),
        (b"[1]", "f:7 is a list, not a JSON object"),
        (b"\xff", "f:7 is not JSON"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": 1e999}', "1e999 is not a number"),
        (b'{"a": ' + b"[" * 100_000, "f:7 is not JSON"),
    ],
)
def test_a_line_that_is_not_a_json_object_is_an_error(content: bytes, message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse(Line(3, "f:7", content))


@pytest.mark.parametrize(
    ("fields", "prompt_field", "prompt"),
    [
        ({"prompt": "x", "other": 1}, "prompt", "x"),
        ({"question": "x"}, "question", "x"),
        ({"token_ids": [1, 2]}, "prompt", [1, 2]),
    ],
)
def test_a_prompt_is_text_or_token_ids(fields: dict[str, Any], prompt_field: str, prompt: object) -> None:
    assert prompt_of(fields, prompt_field) == prompt


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "neither of 'prompt'"),
        ({"prompt": None}, "neither of 'prompt'"),
        ({"prompt": "x", "token_ids": [1]}, "both of 'prompt'"),
        ({"prompt": [1]}, "'prompt' is a list; it must be text"),
        ({"token_ids": "1"}, "must be a list of integers"),
        ({"token_ids": [1.5]}, "must be a list of integers"),
        ({"token_ids": [True]}, "must be a list of integers"),
    ],
)
def test_a_row_without_one_valid_prompt_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        prompt_of(fields, "prompt")


@pytest.mark.parametrize("name", ["b", 1, ["a"], {"a": 1}], ids=str)
def test_a_row_names_one_of_the_adapters(name: object) -> None:
    assert adapter_of({"adapter": "a"}, {"a": "/a"}) == "a"
    with pytest.raises(RowError, match=r"'adapter' is .*; it must be one of a, or left out"):
        adapter_of({"adapter": name}, {"a": "/a"})


def test_a_row_without_sampling_params_has_the_jobs_and_a_seed() -> None:
    params = params_of({}, BASE, 1, 5)
    assert params.seed is not None
    assert params == SamplingParams(max_tokens=7, top_k=3, stop=("x",), seed=params.seed)
    assert params_of({}, BASE, 1, 5) == params


def test_seeds_differ_between_rows_and_between_jobs() -> None:
    assert len({params_of({}, BASE, seed, row).seed for seed in (1, 2) for row in range(50)}) == 100


def test_a_row_overrides_single_sampling_params() -> None:
    own = {"temperature": 0, "stop": ["y", "z"], "logit_bias": {"5": 2}, "seed": 9, "top_k": None}
    assert params_of({"sampling_params": own}, BASE, 1, 5) == SamplingParams(
        max_tokens=7, top_k=3, temperature=0.0, stop=("y", "z"), logit_bias={5: 2.0}, seed=9
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"temprature": 1},
            "'temprature' is not known; it must be one of max_tokens, min_tokens, temperature",
        ),
        ({"temperature": "hot"}, "sampling_params: temperature is 'hot'; it must be a number"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5; it must be a whole number"),
        ({"top_p": 7}, "sampling_params: top_p is 7; it must be above 0"),
        ([1], "'sampling_params' is a list; it must be an object"),
    ],
)
def test_bad_sampling_params_are_an_error(given: object, message: str) -> None:
    with pytest.raises(RowError, match=message):
        params_of({"sampling_params": given}, SamplingParams(), 0, 0)
