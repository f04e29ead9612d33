"""JSON to dataclasses, by their annotations."""

from __future__ import annotations

import dataclasses
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_json(kind: type[T], value: object) -> T:
    """Return `value`, as `json.loads` gives it, as a `kind`: the inverse of `dataclasses.asdict`.

    A `kind` is a dataclass whose fields are numbers, strings, booleans, None, literals of those, other such
    dataclasses, or tuples and dicts (with keys that are strings) of those. Raises ValueError that names the place of a
    value of another type, of an unknown name and of a missing one.
    """
    result: T = _read(kind, value, "")
    return result


def _read(kind: Any, value: Any, place: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None and NoneType in arguments else _read_one_of(arguments, value, place)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], each, f"{place}[{n}]") for n, each in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _read(arguments[1], each, f"{place}.{key}") for key, each in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _read_fields(kind, value, place)
    if kind is float and type(value) is int:
        return float(value)
    # Not isinstance: True is an int.
    if origin is None and type(value) is kind:
        return value
    raise ValueError(f"{place.lstrip('.') or 'it'} is {value!r:.80}; it must be {_name(kind)}")


def _read_one_of(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    for kind in kinds:
        if type(value) is kind:
            return value
    return _read(next(kind for kind in kinds if kind is not NoneType), value, place)


def _read_fields(kind: Any, value: dict[str, Any], place: str) -> Any:
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in value.keys() - fields.keys():
        raise ValueError(f"{f'{place}.{name}'.lstrip('.')} is not known")
    for name, field in fields.items():
        optional = (
            field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        )
        if name not in value and not optional:
            raise ValueError(f"{f'{place}.{name}'.lstrip('.')} is missing")
    return kind(**{name: _read(hints[name], each, f"{place}.{name}") for name, each in value.items()})


def _name(kind: Any) -> str:
    if dataclasses.is_dataclass(kind) or get_origin(kind) is dict:
        return "an object"
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return "a list" if get_origin(kind) is tuple else str(getattr(kind, "__name__", kind))
