"""What the fields of a configuration may hold: declared beside each field, checked in one place.

    batch_size: int = field(default=8, metadata=limits(1))

A number without limits is a mistake of the programmer, so that no setting can be forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from functools import cache
from numbers import Integral, Real
from operator import ge, gt, le, lt
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from llama_ray.utils.redact import redact

_KEY = "limits"
_LARGEST_INT = 2**31 - 1
"""The bound of whole numbers that declare no other one."""
# What float32, which nearly all of these numbers end in, can hold: https://en.wikipedia.org/wiki/IEEE_754
_SMALLEST_FLOAT, _LARGEST_FLOAT = 2.0**-126, (2 - 2**-23) * 2.0**127
_SHOWN_CHARACTERS, _SHOWN_BITS = 40, 128

Kind = type[int] | type[float] | type[bool] | tuple[object, ...]
"""The type of a field that is checked; the choices of a Literal are a tuple."""


@dataclass(frozen=True)
class Limits:
    """The numbers that a setting may be: at least `least` or above `above`, at most `most` or below `below`."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def check(self, name: str, value: object, kind: type[int] | type[float]) -> None:
        """Raise ValueError, with one line, unless the setting `name` may be `value`. NaN keeps no limit."""
        if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
            limit = "a whole number" if kind is int else "a number"
        else:
            limit = self._unmet(value, kind)
        if limit:
            raise ValueError(f"{name} is {shown(value)}; it must be {limit}")

    def _unmet(self, value: Any, kind: type[int] | type[float]) -> str:
        """Return the limit that the number `value` does not keep; an empty text if it keeps all of them."""
        bounds = {
            f"{words} {bound}": holds(value, bound)
            for name, words, holds in _BOUNDS
            if (bound := getattr(self, name)) is not None
        }
        if not all(bounds.values()):
            # A range such as 0 to 1 is clearest as a whole; of whole numbers one end is of interest.
            return " and ".join(text for text, kept in bounds.items() if kind is float or not kept)
        if kind is int:
            return "" if self.most is not None or value <= _LARGEST_INT else f"at most {_LARGEST_INT}"
        if not abs(value) <= _LARGEST_FLOAT:
            return f"at most {_LARGEST_FLOAT:.3g}"
        return f"at least {_SMALLEST_FLOAT:.3g}" if 0 < abs(value) < _SMALLEST_FLOAT else ""


_BOUNDS = (("least", "at least", ge), ("above", "above", gt), ("most", "at most", le), ("below", "below", lt))


def limits(
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Mapping[str, Limits]:
    """Return the metadata of a dataclass field that holds a number; see `Limits`.

    A whole number without `most` is at most 2^31 - 1. Other numbers are 0 or normal numbers of float32.
    """
    return {_KEY: Limits(least, above, most, below)}


def check_fields(config: object, prefix: str = "") -> None:
    """Check numbers, choices (`Literal`) and booleans of a dataclass; None passes where the type allows it.

    `prefix` precedes the names of the fields in messages. Raises ValueError, with one line, for the first field that
    holds what it may not.
    """
    config_type: type = type(config)
    for field, kind, optional in _checked_fields(config_type):
        value = getattr(config, field.name)
        if value is None and optional:
            continue
        name = prefix + field.name
        if isinstance(kind, tuple):
            if value not in kind:
                raise ValueError(f"{name} is {shown(value)}; choose {_listed(kind)}")
        elif kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {shown(value)}; it must be true or false")
        else:
            field.metadata[_KEY].check(name, value, kind)


def shown(value: object) -> str:
    """Return `value` as a message shows it: a text in quotation marks, and cut where it is long."""
    if isinstance(value, int) and value.bit_length() > _SHOWN_BITS:
        # Python refuses to write out a number of thousands of digits.
        return f"a number of about {value.bit_length() * 3 // 10} digits"
    # Before it is cut, because half of a URI may not be known as one.
    text = str(value) if isinstance(value, Real) else redact(repr(value))
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


@cache
def _checked_fields(config: type) -> tuple[tuple[Field[Any], Kind, bool], ...]:
    """Return (field, its kind, whether it may be None) of the fields that `check_fields` checks."""
    types = get_type_hints(config)
    found = []
    for field in fields(config):
        members = get_args(types[field.name]) if _is_union(types[field.name]) else (types[field.name],)
        kinds = [member for member in members if member is not NoneType]
        kind = get_args(kinds[0]) if get_origin(kinds[0]) is Literal else kinds[0]
        if len(kinds) > 1 or not (isinstance(kind, tuple) or kind in (int, float, bool)):
            continue
        if kind in (int, float) and _KEY not in field.metadata:
            raise TypeError(f"{config.__name__}.{field.name} declares no limits")
        found.append((field, kind, NoneType in members))
    return tuple(found)


def _is_union(hint: object) -> bool:
    return NoneType in get_args(hint) or (len(get_args(hint)) > 1 and get_origin(hint) is not Literal)


def _listed(choices: tuple[object, ...]) -> str:
    names = [str(choice) for choice in choices]
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
