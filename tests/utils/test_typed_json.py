from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

import pytest

from llama_ray.utils.typed_json import from_json


@dataclass(frozen=True)
class Inner:
    count: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    share: float
    inner: Inner | None
    by_name: dict[str, Inner]
    settings: dict[str, str | int | bool | None] = field(default_factory=dict)
    unit: Literal["text", "line"] = "text"


OUTER = Outer(0.5, Inner(3, ("a", "b")), {"x": Inner(1)}, {"a": "b", "n": 1, "t": True, "none": None}, "line")


@pytest.mark.parametrize("value", [OUTER, Outer(1.0, None, {})])
def test_what_asdict_wrote_is_read(value: Outer) -> None:
    assert from_json(Outer, json.loads(json.dumps(asdict(value)))) == value


def test_integers_are_floats_and_defaults_fill_in() -> None:
    assert from_json(Outer, {"share": 1, "inner": None, "by_name": {}}) == Outer(1.0, None, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": "half"}, "share is 'half'; it must be float"),
        ({"share": True}, "share is True; it must be float"),
        ({"inner": {"count": 1.5}}, "inner.count is 1.5; it must be int"),
        ({"inner": {}}, "inner.count is missing"),
        ({"by_name": {"x": {"count": 1, "names": [1]}}}, r"by_name.x.names\[0\] is 1; it must be str"),
        ({"by_name": []}, r"by_name is \[\]; it must be an object"),
        ({"settings": {"a": [1]}}, r"settings.a is \[1\]"),
        ({"unit": "word"}, "unit is 'word'; it must be 'text' or 'line'"),
        ({"colour": 1}, "colour is not known"),
    ],
)
def test_a_value_that_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(Outer, json.loads(json.dumps(asdict(OUTER))) | change)
