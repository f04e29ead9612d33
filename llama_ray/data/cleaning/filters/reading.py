"""What filters share: a text with its words, and what they say of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

from llama_ray.data.cleaning.drops import Drop
from llama_ray.data.cleaning.words import Words, find_words


class Reading:
    """A text that is not only white space, and its words once they are asked for."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> Words:
        """The words of the text."""
        return find_words(self.text)


class Verdict(NamedTuple):
    """What a filter says: the `rule` that a text breaks, or an empty text, and what the rule saw.

    A filter that takes lines away gives the `text` that remains and the `lines` that it dropped.
    """

    rule: str = ""
    detail: str = ""
    text: str | None = None
    lines: tuple[Drop, ...] = ()


PASSED = Verdict()

Filter = Callable[[Reading], Verdict]


def too_much(rule: str, share: float, limit: float, of: str) -> Verdict | None:
    """Return that a share is above its limit, or None."""
    return Verdict(rule, f"{share:.3g} {of}; at most {limit}") if share > limit else None


def too_little(rule: str, share: float, limit: float, of: str) -> Verdict | None:
    """Return that a share is below its limit, or None."""
    return Verdict(rule, f"{share:.3g} {of}; at least {limit}") if share < limit else None


def repeated(pieces: Sequence[str]) -> tuple[int, int]:
    """Return how many of `pieces` occurred before, and their characters."""
    if len(set(pieces)) == len(pieces):
        return 0, 0
    seen: set[str] = set()
    count = characters = 0
    for piece in pieces:
        if piece in seen:
            count += 1
            characters += len(piece)
        else:
            seen.add(piece)
    return count, characters
