from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from llama_ray.generation.constraints.limits import MAX_GRAMMAR_BYTES
from llama_ray.generation.sampling.params import SamplingParams


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": -1}, "max_tokens is -1; it must be at least 0"),
        ({"min_tokens": 17}, "min_tokens is 17; it must be at most max_tokens, 16"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1; it must be at least 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 1.01}, "min_p is 1.01"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be at most 18446744073709551615"),
        ({"stop": ""}, "stop is ''; it must be a string or several, none of them empty"),
        ({"stop": ("a", "")}, "stop is ('a', ''); it must be a string or several"),
        ({"stop_token_ids": (3, -1)}, "stop_token_ids has a token id that is -1; it must be at least 0"),
        (
            {"repetition_penalty": 0.0},
            "repetition_penalty is 0.0; it must be at least 0.001 and at most 1000",
        ),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; it must be at least -2 and at most 2"),
        ({"frequency_penalty": -3.0}, "frequency_penalty is -3.0"),
        ({"logit_bias": {5: math.inf}}, "logit_bias[5] is inf; it must be at least -1e+30 and at most 1e+30"),
        ({"logprobs": 21}, "logprobs is 21; it must be at most 20"),
        (
            {"allowed_token_ids": (3, -1)},
            "allowed_token_ids has a token id that is -1; it must be at least 0",
        ),
        ({"allowed_token_ids": (2**31,)}, "allowed_token_ids has a token id that is 2147483648"),
        ({"allowed_token_ids": ()}, "allowed_token_ids is (); it must be at least one token id, or None"),
        (
            {"bad_words": ("a", " ")},
            "bad_words is ('a', ' '); it must be a string or several, none of them blank",
        ),
        ({"bad_words": (1,)}, "bad_words is (1,); it must be a string or several"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output is 1; it must be true or false"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1; it must be at least 0"),
        ({"json_schema": "[1]"}, "json_schema is [1]; it must be a JSON object"),
        ({"n": 0}, "n is 0; it must be at least 1"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name_value_and_limit(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match="it must be") as error:
        SamplingParams(**values)  # type: ignore[arg-type]
    assert message in str(error.value)
    assert "\n" not in str(error.value)


NUMBERS = [
    f.name
    for f in dataclasses.fields(SamplingParams)
    if type(f.default) in (int, float) or "logprobs" in f.name
]
ODD = [
    math.nan,
    math.inf,
    -math.inf,
    2**31,
    2**63,
    2**64,
    10**5000,
    1e39,
    -1e39,
    1e-46,
    0.5,
    True,
    "1",
    [1],
    {},
]


@pytest.mark.parametrize("name", [*NUMBERS, "seed", "stop_token_ids", "logit_bias"])
def test_an_odd_number_is_refused_in_a_short_line_or_has_a_meaning_in_every_type(name: str) -> None:
    for odd in ODD:
        ids = ("stop_token_ids", "prompt_logprobs_next")
        given = (3, odd) if name in ids else {3: odd} if name == "logit_bias" else odd
        try:
            SamplingParams(**{name: given})  # type: ignore[arg-type]
        except ValueError as refused:
            message = str(refused)
            assert name in message
            assert len(message) < 250
        else:
            assert not isinstance(odd, (bool, str, list, dict))
            kept = float(odd)
            assert math.isfinite(kept)
            assert abs(kept) < 3.5e38
            assert name == "logit_bias" or kept == int(kept) or kept == 0.5


@pytest.mark.parametrize("key", [True, 1.0, "1", -1, 2**63, None])
def test_a_key_of_logit_bias_is_a_token_id(key: object) -> None:
    with pytest.raises(ValueError, match="logit_bias has a token id that is"):
        SamplingParams(logit_bias={key: 1.0})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"logit_bias": dict.fromkeys(range(1025), 1.0)},
            "logit_bias has 1,025 entries; it must have at most 1,024",
        ),
        (
            {"stop_token_ids": tuple(range(980_000))},
            "stop_token_ids has 980,000 entries; it must have at most 128",
        ),
        ({"stop": ("s",) * 17}, "stop has 17 strings; it must have at most 16"),
        ({"bad_words": ("s",) * 129}, "bad_words has 129 strings; it must have at most 128"),
        ({"stop": "s" * 1001}, "stop has 1,001 characters in one string; it must have at most 1,000"),
        ({"stop": 5}, "stop is 5; it must be a string or several"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5; it must be token ids"),
        ({"logit_bias": [5]}, "logit_bias is [5]; it must be token ids"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no'; it must be true or false"),
    ],
)
def test_what_costs_time_at_every_token_is_bounded(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SamplingParams(**values)  # type: ignore[arg-type]


def test_parameters_are_read_from_a_json_object() -> None:
    values = {"stop": ["a"], "stop_token_ids": [1], "logit_bias": {"5": 2}, "max_tokens": 3}
    assert SamplingParams.from_json(values) == SamplingParams(
        stop=("a",), stop_token_ids=(1,), logit_bias={5: 2.0}, max_tokens=3
    )
    with pytest.raises(ValueError, match=r"logit_bias has a token id that is '5\.0'"):
        SamplingParams.from_json({"logit_bias": {"5.0": 2}})


def test_stop_strings_are_a_tuple_whether_one_or_several_were_given() -> None:
    assert SamplingParams(stop="end").stop_strings == ("end",)
    assert SamplingParams(stop=("a", "b")).stop_strings == ("a", "b")
    assert SamplingParams().stop_strings == ()


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"json_schema": "{"}, "json_schema is '{'; it must be JSON: "),
        ({"json_schema": {"enum": {1, 2}}}, "json_schema is {'enum': {1, 2}}; it must be JSON: "),
        ({"json_schema": "[1]"}, "json_schema is [1]; it must be a JSON object"),
        ({"json_schema": {"const": math.nan}}, "it must be JSON: NaN is not one of its numbers"),
        ({"json_schema": '{"const": ' + "9" * 5000 + "}"}, "it must be JSON: Exceeds the limit"),
        ({"json_schema": '{"const": "\ud800"}'}, r"json_schema has '\ud800' at 11, half of a character"),
        ({"json_schema": '{"a": ' * 200 + "1" + "}" * 200}, "json_schema is nested 200 levels deep; it must"),
        (
            {"json_schema": '{"a": ' * 9999 + "1" + "}" * 9999},
            "json_schema is nested hundreds of levels deep",
        ),
        ({"json_schema": nested(199)}, "json_schema is nested 200 levels deep; it must be at most 120"),
        ({"json_schema": nested(900)}, "json_schema is nested "),
        ({"json_schema": {"const": "a" * MAX_GRAMMAR_BYTES}}, "it must have at most 262,144; simplify it"),
        ({"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, "regex has 262,145 bytes; it must have at most 262,144"),
        ({"regex": "ä\ud800"}, r"regex has '\ud800' at 1, half of a character; leave it out"),
        ({"regex": 5}, "regex is 5; it must be a regular expression, a string"),
        ({"json_schema": {}, "regex": "a"}, "json_schema and regex are both given; give one of them"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos is True; it must be False with regex"),
        ({"json_schema": {}, "ignore_eos": True}, "ignore_eos is True; it must be False with json_schema"),
    ],
)
def test_an_unusable_constraint_is_refused_in_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        SamplingParams(**values)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
