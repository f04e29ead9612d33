"""What one row asks for: its fields, prompt and sampling parameters."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from llama_ray.batch_inference.partitions import Line
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.utils.fields import shown

_PARAM_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))


class RowError(ValueError):
    """A row that cannot be answered; the message becomes its `error` field."""


def parse(line: Line) -> dict[str, Any]:
    """Return the row's fields. Raises RowError unless the line is a JSON object in UTF-8."""
    try:
        fields = json.loads(line.content.decode(), parse_constant=_refuse_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{line.location} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RowError(
            f"{line.location} is a {type(fields).__name__}, not a JSON object; write one object a line"
        )
    return fields


def prompt_of(fields: Mapping[str, Any], prompt_field: str) -> str | list[int]:
    """Return the text or the token ids to continue. Raises RowError if a row has neither or both."""
    text, token_ids = fields.get(prompt_field), fields.get("token_ids")
    if (text is None) == (token_ids is None):
        which = "both" if text is not None else "neither"
        raise RowError(f"the row has {which} of {prompt_field!r} (text) and 'token_ids'; give one of them")
    if token_ids is None:
        if not isinstance(text, str):
            raise RowError(
                f"{prompt_field!r} is a {type(text).__name__}; it must be text; give token ids as 'token_ids'"
            )
        return text
    if not isinstance(token_ids, list) or any(type(token) is not int for token in token_ids):
        raise RowError("'token_ids' must be a list of integers")
    return token_ids


def adapter_of(fields: Mapping[str, Any], adapters: Collection[str]) -> str | None:
    """Return the adapter that a row names; None without one, and if the job has no `adapters`.

    Raises RowError for a name that is not among them.
    """
    name = fields.get("adapter") if adapters else None
    if name is not None and (not isinstance(name, str) or name not in adapters):
        raise RowError(f"'adapter' is {shown(name)}; it must be one of {', '.join(adapters)}, or left out")
    return name


def params_of(fields: Mapping[str, Any], base: SamplingParams, seed: int, row: int) -> SamplingParams:
    """Return `base` with the values of the row's `sampling_params`. Raises RowError for a bad name or value.

    A row without its own seed gets one that depends only on the job's `seed` and the row's number.
    """
    given = fields.get("sampling_params") or {}
    if not isinstance(given, dict):
        raise RowError(f"'sampling_params' is a {type(given).__name__}; it must be an object")
    unknown = sorted(given.keys() - set(_PARAM_NAMES))
    if unknown:
        raise RowError(
            f"sampling_params: {unknown[0]!r} is not known; it must be one of {', '.join(_PARAM_NAMES)}"
        )
    defaults = {name: getattr(base, name) for name in _PARAM_NAMES} | {"seed": row_seed(seed, row)}
    try:
        return SamplingParams.from_json(defaults | {k: v for k, v in given.items() if v is not None})
    except ValueError as error:
        raise RowError(f"sampling_params: {error}") from None


def row_seed(seed: int, row: int) -> int:
    """Return 64 bits that depend on the job's seed and the row's number."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest(), "little")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_number(text)


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text} is not a number that JSON can hold")
