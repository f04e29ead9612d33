"""A schema or expression as the text that grammars are compiled from, checked as far as that costs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from llama_ray.generation.constraints.limits import MAX_GRAMMAR_BYTES, MAX_SCHEMA_DEPTH
from llama_ray.utils.errors import first_line
from llama_ray.utils.fields import shown


def regex_text(regex: object) -> str:
    """Return a regular expression. Raises ValueError unless it is text of at most `MAX_GRAMMAR_BYTES`."""
    if not isinstance(regex, str):
        raise ValueError(f"regex is {shown(regex)}; it must be a regular expression, a string")
    return _checked("regex", regex)


def schema_text(schema: Mapping[str, Any] | str) -> str:
    """Return a JSON schema as JSON.

    Raises ValueError unless it is a JSON object, at most `MAX_SCHEMA_DEPTH` deep and `MAX_GRAMMAR_BYTES` long.
    """
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(_too_deep("hundreds of levels")) from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"json_schema is {shown(schema)}; it must be JSON: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(
            f'json_schema is {shown(value)}; it must be a JSON object, such as {{"type": "object"}}'
        )
    depth = _depth(value)
    if depth > MAX_SCHEMA_DEPTH:
        raise ValueError(_too_deep(f"{depth} levels"))
    return _checked("json_schema", text)


def _checked(name: str, text: str) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has {text[error.start]!r} at {error.start}, half of a character; leave it out"
        ) from None
    if size > MAX_GRAMMAR_BYTES:
        raise ValueError(
            f"{name} has {size:,} bytes; it must have at most {MAX_GRAMMAR_BYTES:,}; simplify it"
        )
    return text


def _too_deep(levels: str) -> str:
    return (
        f"json_schema is nested {levels} deep; it must be at most {MAX_SCHEMA_DEPTH}; use $ref to shorten it"
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not one of its numbers")


def _depth(value: object) -> int:
    """Return how many objects and lists are within each other, level by level rather than by recursion."""
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, (dict, list))]:
        depth += 1
        level = [child for v in level for child in (v.values() if isinstance(v, dict) else v)]
    return depth
