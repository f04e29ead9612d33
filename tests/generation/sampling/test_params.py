from __future__ import annotations

import math
import re

import pytest

from llama_ray.generation.sampling.params import SamplingParams


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"min_tokens": 17}, "min_tokens is 17; it must be 0 (off) to max_tokens, 16"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0 (greedy) or above"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1; it must be 0 (off) or above"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1 (off)"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 1.01}, "min_p is 1.01"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be -2^63 to 2^64 - 1"),
        ({"stop": ""}, "stop is ''; it must be a string or several, none of them empty"),
        ({"stop": ("a", "")}, "stop is ('a', ''); it must be a string or several"),
        ({"stop_token_ids": (3, -1)}, "stop_token_ids is (3, -1); it must be token ids, integers from 0 on"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0 (1 is off)"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; it must be between -2 and 2"),
        ({"frequency_penalty": -3.0}, "frequency_penalty is -3.0"),
        ({"logit_bias": {5: math.inf}}, "logit_bias[5] is inf; it must be a finite number"),
        ({"logprobs": 21}, "logprobs is 21; it must be 0 to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1; it must be 0 to 20"),
        ({"json_schema": "[1]"}, "json_schema is [1]; it must be a JSON object"),
        ({"n": 0}, "n is 0; it must be 1 to 128"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name_value_and_limit(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match="it must be") as error:
        SamplingParams(**values)  # type: ignore[arg-type]
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_stop_strings_are_a_tuple_whether_one_or_several_were_given() -> None:
    assert SamplingParams(stop="end").stop_strings == ("end",)
    assert SamplingParams(stop=("a", "b")).stop_strings == ("a", "b")
    assert SamplingParams().stop_strings == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"json_schema": "{"}, "json_schema is '{'; it must be JSON: "),
        ({"json_schema": {"enum": {1, 2}}}, "json_schema is {'enum': {1, 2}}; it must be JSON: "),
        ({"json_schema": {}, "regex": "a"}, "json_schema and regex are both given; give one of them"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos is True; it must be False with regex"),
        ({"json_schema": {}, "ignore_eos": True}, "ignore_eos is True; it must be False with json_schema"),
    ],
)
def test_an_unusable_constraint_is_refused_in_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        SamplingParams(**values)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
