"""What a run is trained on, as the user says it: prepared directories by name, with weights.

data/mine                                        one directory
web=data/web:0.7  code=s3://bucket/code:0.3      several, with names and weights
web=data/all#web:0.7                             the shards of one label in a directory
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeAlias

from llama_ray.utils.fields import shown
from llama_ray.utils.redact import RedactedRepr

ONLY_SOURCE = "data"
"""Name of a source that has none, because it is alone; not that of its path, because the order follows from names."""
Settings = Mapping[str, str | float | None]
"""Fields of `DataSource` but its name."""
Given: TypeAlias = "str | Path | Sequence[str] | Sequence[DataSource] | Mapping[str, str | Settings]"
"""What names sources, see `parse_sources`."""

_NAMED = re.compile(r"([A-Za-z][\w.-]{0,63})=(.*)", re.DOTALL)
_NUMBER = re.compile(r"\+?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
# A host before the last colon of a URI makes what follows a port.
_ENDS_WITH_A_HOST = re.compile(r"(://|endpoint_override=)([^/?&#@]*@)?[^/?&#:]*$")
_EXAMPLE = "write NAME=DIR or NAME=DIR:WEIGHT, such as web=data/web:0.7"


@dataclass(frozen=True, repr=False)
class DataSource(RedactedRepr):
    """A prepared data directory, or the shards of one label in it, as a source of a mixture.

    `location` is a path or a URI. Without `weight` the size counts. `max_repetitions` is how often, at most, a run may
    go through it.
    """

    name: str
    location: str
    weight: float | None = None
    label: str | None = None
    max_repetitions: float | None = None

    def __post_init__(self) -> None:
        if not _NAMED.fullmatch(f"{self.name}="):
            raise ValueError(
                f"data has a source named {shown(self.name)}; a name must begin with a letter and have at most 64 "
                f"letters, digits, '_', '.' and '-'; {_EXAMPLE}"
            )
        if not self.location:
            raise ValueError(f"data has no directory for source {self.name}; {_EXAMPLE}")
        for name, value in (("weight", self.weight), ("max_repetitions", self.max_repetitions)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"data has {name} {value} for source {self.name}; it must be a number from 0 up"
                )

    def __str__(self) -> str:
        return self.location + (f"#{self.label}" if self.label else "")


def parse_sources(data: Given) -> tuple[DataSource, ...]:
    """Return the sources that `data` names, sorted by name; see the module for the forms of a text.

    A mapping is from names to a text without a name, or to the fields of `DataSource`. Sources are returned as they
    are. Raises ValueError, with one
    line, for what is no source, names that are there twice, and weights that some sources have and others lack.
    """
    if isinstance(data, str | Path):
        sources = [_parse(str(data), alone=True)]
    elif isinstance(data, Mapping):
        sources = [_of_mapping(name, value) for name, value in data.items()]
    else:
        sources = [
            item if isinstance(item, DataSource) else _parse(item, alone=len(data) == 1) for item in data
        ]
    if not sources:
        raise ValueError(f"data names no source; {_EXAMPLE}")
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"data has two sources named {name}; give each a name of its own")
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        raise ValueError(
            f"data has no weight for source {names[weighted.index(False)]}; give all sources a weight, or none, which "
            "weights them by their size"
        )
    return tuple(sorted(sources, key=lambda source: source.name))


def weights(sources: Sequence[DataSource]) -> dict[str, float] | None:
    """Return the weight of each source; None where they have none."""
    found = {source.name: source.weight for source in sources if source.weight is not None}
    return found or None


def _parse(text: str, *, alone: bool) -> DataSource:
    named = _NAMED.fullmatch(text)
    if named:
        return _of_text(named[1], named[2])
    if alone:
        return DataSource(ONLY_SOURCE, text)
    raise ValueError(f"data has several sources, and {shown(text)} has no name; {_EXAMPLE}")


def _of_text(name: str, text: str) -> DataSource:
    """Read `LOCATION[#LABEL][:WEIGHT]`; only a number that is not a port is a weight."""
    location, colon, last = text.rpartition(":")
    weight: float | None = None
    if colon and _NUMBER.fullmatch(last) and not _is_port(location, last):
        weight = float(last)
    else:
        location = text
    location, _, label = location.partition("#")
    return DataSource(name, location, weight, label or None)


def _is_port(before: str, number: str) -> bool:
    return number.isdigit() and _ENDS_WITH_A_HOST.search(before) is not None


def _of_mapping(name: str, value: str | Settings) -> DataSource:
    if isinstance(value, str):
        return _of_text(name, value)
    known = {field.name for field in fields(DataSource)} - {"name"}
    unknown = sorted(set(value) - known)
    if unknown or "location" not in value:
        wrong = f"has the unknown entry {shown(unknown[0])}" if unknown else "has no location"
        raise ValueError(f"data: source {name} {wrong}; the entries are {', '.join(sorted(known))}")
    return DataSource(
        name,
        str(value["location"]),
        _number(name, "weight", value),
        None if value.get("label") is None else str(value["label"]),
        _number(name, "max_repetitions", value),
    )


def _number(name: str, entry: str, settings: Settings) -> float | None:
    value = settings.get(entry)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise ValueError(f"data has {entry} {shown(value)} for source {name}; it must be a number from 0 up")
