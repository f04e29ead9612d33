"""The split that a text is in: a pure function of the seed and the text's id."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass


def number_of(seed: int, id: str) -> float:
    """Return a pseudo-random number in [0, 1) that depends on `seed` and `id` only."""
    key = f"{seed}:{id}".encode(errors="surrogateescape")
    # 53 bits, which a float holds exactly: 64 of them could be rounded up to 1.
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) / 2**53


def split_of(number: float, limit: float) -> str:
    """Return the split of a text with this number: validation if it is below `limit`."""
    return "validation" if number < limit else "train"


@dataclass(frozen=True)
class Range:
    """The lowest and the highest number of some texts; of none at all, (inf, -inf)."""

    lowest: float = math.inf
    highest: float = -math.inf

    def __or__(self, other: Range) -> Range:
        return Range(min(self.lowest, other.lowest), max(self.highest, other.highest))


def limit_for(fraction: float, numbers: Range) -> float:
    """Return the number below which a text is for validation: `fraction`, or what leaves a text in both splits.

    `numbers` spans those of all texts, no two of which are equal. Raises ValueError for fewer than two texts.
    """
    if numbers.lowest >= numbers.highest:
        raise ValueError("there are fewer than two texts")
    return min(max(fraction, math.nextafter(numbers.lowest, 1)), numbers.highest)


def changes_split(numbers: Range, before: float, after: float) -> bool:
    """Whether the text of `numbers` that decides `after`, which `limit_for` returned, changes its split with it."""
    return before <= numbers.lowest < after or after <= numbers.highest < before
