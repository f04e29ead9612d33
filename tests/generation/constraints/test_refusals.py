"""What a grammar is refused for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.constraints.grammars import Grammars
from llama_ray.generation.constraints.messages import Kind

VOCAB_SIZE = 384


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    grammars = Grammars(tokenizer, VOCAB_SIZE, {1})
    yield grammars
    grammars.close()


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("regex", "[a", "unclosed character class"),
        ("regex", "(?=a)b", "look-around, .*, is not supported"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", "(" * 5000 + "a" + ")" * 5000, "maximum number of nested parentheses"),
        ("regex", r"(?-u)\xff", "can match invalid UTF-8"),
        ("regex", r"[^\x00-\x{10FFFF}]", "no token of this model's vocabulary can begin"),
        ("regex", "(?:a?){500}a{500}", "it grows too complex while it is followed"),
        ("json_schema", {"type": "objec"}, "Invalid type: objec"),
        ("json_schema", {"not": {}}, 'Unimplemented keys: .*"not"'),
        ("json_schema", {"$ref": "#/nowhere"}, "'/nowhere'"),
        ("json_schema", {"$ref": "#"}, "no token of this model's vocabulary can begin"),
        ("json_schema", {"allOf": [{"$ref": "#"}]}, "no token of this model's vocabulary can begin"),
        ("json_schema", nested(90), "recursion limit exceeded"),
        ("json_schema", {"enum": [{"k": i} for i in range(2500)]}, "grows too complex"),
        ("json_schema", {"type": "array", "minItems": 10**30}, "minItems"),
    ],
)
def test_a_grammar_that_cannot_be_enforced_is_refused_in_one_line(
    grammars: Grammars, kind: Kind, value: Any, message: str
) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    # The second time it is known.
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{kind} cannot be enforced: .*({message})") as error:
            grammars.constraints(kind, text, 1)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400
