"""Gopher's rules against repetition: Rae et al. 2021, https://arxiv.org/abs/2112.11446, table A1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_ray.data.cleaning.filters.reading import PASSED, Reading, Verdict, repeated, too_much
from llama_ray.data.cleaning.words import Hashes, Words, ngram_factor

TOP_NGRAMS = {2: 0.2, 3: 0.18, 4: 0.16}
"""Limits of the share of a text's characters that are in its most frequent run of so many words."""
REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
"""Limits of the share of a text's characters that are in runs of so many words that occurred before."""
_PIECES, _PIECES_CHARACTERS = 0.3, 0.2

Places = NDArray[np.int64]


class Repeats(NamedTuple):
    """The runs of `n` words that occur more than once.

    `places` holds the first word of each, in the order of the text, and `groups` a number for each: equal runs have
    the same one. Both are of shape [runs].
    """

    n: int
    places: Places
    groups: Places


def gopher_repetition(reading: Reading) -> Verdict:
    """Say whether a text repeats its paragraphs, lines or runs of words."""
    text = reading.text
    return (
        _pieces("para", "paragraphs", paragraphs(text), len(text))
        or _pieces("line", "lines", lines(text), len(text))
        or _runs(reading.words, len(text))
        or PASSED
    )


def paragraphs(text: str) -> list[str]:
    """Split at two or more line feeds, without white space around the text."""
    # Of an odd number of line feeds the last one is left before the next paragraph.
    return [piece for part in text.strip().split("\n\n") if (piece := part.lstrip("\n"))]


def lines(text: str) -> list[str]:
    """Split at one or more line feeds; one at the beginning or the end leaves an empty line there, as in datatrove."""
    empty = [""] * (text.startswith("\n") + text.endswith("\n"))
    return [line for line in text.split("\n") if line] + empty


def _pieces(name: str, kind: str, pieces: list[str], characters: int) -> Verdict | None:
    count, lost = repeated(pieces)
    return too_much(
        f"dup_{name}_frac", count / len(pieces), _PIECES, f"of the {kind} occurred before"
    ) or too_much(
        f"dup_{name}_char_frac",
        lost / characters,
        _PIECES_CHARACTERS,
        f"of the characters are in repeated {kind}",
    )


def _runs(words: Words, characters: int) -> Verdict | None:
    # Where each word ends if words followed each other without space.
    ends = np.concatenate(([0], np.cumsum(words.lengths)))
    for repeats in _repeats(words):
        n = repeats.n
        if limit := TOP_NGRAMS.get(n):
            share = _top(repeats, ends) / characters
            verdict = too_much(
                f"top_{n}_gram", share, limit, f"of the characters are in one run of {n} words"
            )
        else:
            limit = REPEATED_NGRAMS[n]
            share = _again(repeats, ends, limit * characters) / characters
            verdict = too_much(
                f"duplicated_{n}_n_grams",
                share,
                limit,
                f"of the characters are in repeated runs of {n} words",
            )
        if verdict:
            return verdict
    return None


def _repeats(words: Words) -> Iterator[Repeats]:
    """Yield the repeated runs of 2, 3, ... 10 words, as far as the text has so many words.

    A run of n words occurs twice only if its first n - 1 words do, so that each length has fewer places to look at.
    """
    hashes = words.hashes
    places = np.arange(len(words))
    runs = hashes
    for n in range(2, max(REPEATED_NGRAMS) + 1):
        if n > len(words):
            return
        inside = places <= len(words) - n
        places = places[inside]
        runs = runs[inside] + hashes[places + (n - 1)] * np.uint64(ngram_factor(n - 1))
        groups, found = _equal(runs)
        places, runs = places[found], runs[found]
        yield Repeats(n, places, groups[found])


def _equal(values: Hashes) -> tuple[Places, NDArray[np.bool_]]:
    """Return a number for each value, the same for equal ones, and whether the value occurs more than once."""
    order = np.argsort(values)
    ordered = values[order]
    first = np.ones(len(values) + 1, np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:-1])
    groups = np.empty(len(values), np.int64)
    groups[order] = np.cumsum(first[:-1])
    found = np.empty(len(values), np.bool_)
    found[order] = ~(first[:-1] & first[1:])
    return groups, found


def _top(repeats: Repeats, ends: Places) -> int:
    """Return the characters, with a space between words, in the run that is most frequent, the first of equals."""
    n, places, groups = repeats
    if not len(places):
        return int(ends[n]) + n - 1
    counts = np.bincount(groups)
    # The first place whose run is among the most frequent ones.
    place = places[np.argmax(counts[groups])]
    return int(ends[place + n] - ends[place] + n - 1) * int(counts.max())


def _again(repeats: Repeats, ends: Places, limit: float) -> int:
    """Return the characters in runs that occurred before, counted from left to right without overlap.

    The count stops once it is above `limit`.
    """
    n, places, groups = repeats
    if not len(places):
        return 0
    lengths = ends[places + n] - ends[places]
    first = np.full(int(groups.max()) + 1, -1)
    first[groups[::-1]] = places[::-1]
    most = int(lengths[first[groups] != places].sum())
    if most <= limit:
        # Overlapping runs are not counted twice, so that the exact number is not above it either.
        return most
    seen: set[int] = set()
    total = free = 0
    for place, group, length in zip(places.tolist(), groups.tolist(), lengths.tolist(), strict=True):
        if place < free:
            continue
        if group in seen:
            total += length
            free = place + n
            if total > limit:
                break
        else:
            seen.add(group)
    return total
