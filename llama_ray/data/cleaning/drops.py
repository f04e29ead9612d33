"""What cleaning took away: counts by rule and source, with a few examples of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from llama_ray.data.cleaning.excerpts import excerpt, rank
from llama_ray.utils.errors import printable
from llama_ray.utils.typed_json import from_json

MAX_EXAMPLES = 3
_EXAMPLE_CHARACTERS = 300

Unit = Literal["text", "line"]


@dataclass(frozen=True)
class Drop:
    """What a rule took away from one text: the text as a whole, or some of its lines.

    `example` is the text, or the first of the lines; `detail` is what the rule saw. `characters` counts all that is
    lost.
    """

    rule: str
    unit: Unit
    count: int
    characters: int
    example: str
    detail: str = ""

    def under(self, name: str) -> Drop:
        """Return this drop with its rule named as one of the filter `name`."""
        return replace(self, rule=f"{name}/{self.rule}")


@dataclass(frozen=True)
class Example:
    """A text or a line that was dropped: the text's id, what the rule saw, and the beginning in its lines."""

    id: str
    detail: str
    text: str


@dataclass
class Dropped:
    """What a rule took away from a source."""

    rule: str
    source: str
    unit: Unit
    count: int
    characters: int
    examples: tuple[Example, ...]


class Drops:
    """Counts by rule, unit and source.

    Of the examples those stay whose ids have the smallest hashes, so that the parts of a corpus may be merged in any
    order.
    """

    def __init__(self) -> None:
        self._all: dict[tuple[str, str, Unit], Dropped] = {}

    def add(self, source: str, id: str, drop: Drop) -> None:
        """Count what a rule took away from the text `id`."""
        key = drop.rule, source, drop.unit
        found = self._all.get(key)
        # To make a text printable costs more than to compare its rank.
        if found is None or len(found.examples) < MAX_EXAMPLES or rank(id) <= rank(found.examples[-1].id):
            examples: tuple[Example, ...] = (_example(id, drop),)
        else:
            examples = ()
        self._add(Dropped(drop.rule, source, drop.unit, drop.count, drop.characters, examples))

    def merge(self, other: Drops) -> None:
        """Count what `other` counted."""
        for dropped in other._all.values():
            self._add(dropped)

    def rows(self) -> list[Dropped]:
        """Return what was counted, what lost most characters first."""
        return sorted(self._all.values(), key=lambda row: (-row.characters, row.rule, row.source, row.unit))

    def to_json(self) -> list[dict[str, object]]:
        """Return the content as values of JSON."""
        return [asdict(row) for row in self.rows()]

    @classmethod
    def from_json(cls, rows: Sequence[Mapping[str, object]]) -> Drops:
        """Rebuild what `to_json` returned."""
        drops = cls()
        for row in rows:
            drops._add(from_json(Dropped, row))
        return drops

    def _add(self, more: Dropped) -> None:
        key = more.rule, more.source, more.unit
        found = self._all.get(key)
        if found is None:
            found = self._all[key] = Dropped(more.rule, more.source, more.unit, 0, 0, ())
        found.count += more.count
        found.characters += more.characters
        examples = sorted({*found.examples, *more.examples}, key=_order)
        found.examples = tuple(examples[:MAX_EXAMPLES])


def _example(id: str, drop: Drop) -> Example:
    return Example(id, printable(drop.detail), excerpt(drop.example, _EXAMPLE_CHARACTERS))


def _order(example: Example) -> tuple[int, str, str, str]:
    return rank(example.id), example.id, example.text, example.detail
