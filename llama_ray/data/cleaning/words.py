"""The words of a text, as arrays: where they are, what they are made of, and a hash of each.

A word is what stands between white space once punctuation is taken off its ends, one character at a time. Inside of it
punctuation stays (3.14, foo(bar), https://a-b.c), but - / , : < > and = between two letters are words and divide it,
unless it begins as an address, and an apostrophe between two letters begins a word (it 's). A run of full stops is a
word, and so is each ideograph and each hiragana. For English this is close to spaCy's rules; docs/data.md says how far
verdicts differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from llama_ray.data.cleaning.characters import (
    ALPHABETIC,
    APOSTROPHE,
    CONTENT,
    CORE,
    EDGE,
    RUN,
    SPACE,
    SPLIT,
    flags,
    plain_flags,
)
from llama_ray.utils.integers import splitmix64

_ADDRESS, _SCHEME = re.compile(r"://\S+"), re.compile(r"[^\w\s]*\w+")
_BLOCK = 1 << 18
"""Characters that are worked on at once, which bounds memory: a text may be long."""
_BASE = 0x9FB21C651E98DF25
_NGRAM_BASE = 0xD6E8FEB86659FD93
_MODULUS = 1 << 64

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Words:
    """The words of a text; all arrays are of shape [words].

    `starts` and `lengths` are in characters, `hashes` of 64 bits. `alphabetic`: the word has a letter. `content`: it
    has a character that is neither punctuation nor control.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    hashes: Hashes
    alphabetic: NDArray[np.bool_]
    content: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.starts)


def find_words(text: str, punctuation: bool = True) -> Words:
    """Return the words of `text`; without `punctuation` this counts as white space."""
    table = flags() if punctuation else plain_flags()
    if len(text) <= _BLOCK:
        return _words(text, table)
    blocks = []
    for start, stop in _blocks(text):
        words = _words(text[start:stop], table)
        blocks.append(replace(words, starts=words.starts + start))
    return Words(
        *(np.concatenate([getattr(block, field.name) for block in blocks]) for field in fields(Words))
    )


def word_hash(word: str) -> int:
    """Return the hash that `find_words` gives to a word."""
    return int(find_words(word).hashes[0])


def ngram_hashes(hashes: Hashes, n: int) -> Hashes:
    """Return the hashes of the runs of `n` words, [max(words - n + 1, 0)]; `hashes` are those of the words."""
    runs = max(len(hashes) - n + 1, 0)
    result = np.zeros(runs, np.uint64)
    for place in range(n):
        result += hashes[place : place + runs] * np.uint64(ngram_factor(place))
    return result


def ngram_factor(place: int) -> int:
    """Return what the hash of a word is multiplied by at this place of a run of words."""
    return pow(_NGRAM_BASE, place, _MODULUS)


def _blocks(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of pieces of the text that end with white space, if there is any."""
    start = 0
    while len(text) - start > _BLOCK:
        end = start + _BLOCK
        cut = max(text.rfind(" ", start, end), text.rfind("\n", start, end)) + 1
        yield start, cut or end
        start = cut or end
    yield start, len(text)


def _words(text: str, table: NDArray[np.uint8]) -> Words:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    if not len(codes):
        empty = np.zeros(0, np.int64)
        return Words(empty, empty, empty.astype(np.uint64), empty.astype(np.bool_), empty.astype(np.bool_))
    kinds = table.take(codes)
    starts = np.flatnonzero(_boundaries(text, codes, kinds))
    powers, inverses = _powers()
    # The hash is a polynomial modulo 2^64, whose first power is that of the word's place in the block.
    hashes = np.add.reduceat(codes * powers[: len(codes)], starts) * inverses[starts]
    made_of = np.bitwise_or.reduceat(kinds, starts)
    lengths = np.diff(starts, append=len(codes))
    words = np.flatnonzero(made_of & SPACE == 0)
    made_of = made_of[words]
    return Words(
        starts[words],
        lengths[words],
        splitmix64(hashes[words]),
        made_of & ALPHABETIC != 0,
        made_of & CONTENT != 0,
    )


def _boundaries(text: str, codes: NDArray[np.uint32], kinds: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return where a word or a run of white space begins."""
    boundaries = np.ones(len(codes), np.bool_)
    both = kinds[1:] & kinds[:-1]
    boundaries[1:] = both & (CORE | SPACE) == 0
    runs = np.flatnonzero(both & RUN) + 1
    boundaries[runs] = False
    _keep_inner_edges(kinds, boundaries)
    between = np.flatnonzero(kinds[1:-1] & (SPLIT | APOSTROPHE)) + 1
    between = between[kinds[between - 1] & kinds[between + 1] & ALPHABETIC != 0]
    if "://" in text:
        between = between[~_in_addresses(text, between)]
    boundaries[between] = True
    boundaries[between[kinds[between] & SPLIT != 0] + 1] = True
    return boundaries


def _in_addresses(text: str, places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say which of these places are in a word that begins as an address."""
    inside = np.zeros(len(places), np.bool_)
    for address in _ADDRESS.finditer(text):
        # A scheme is short.
        before = text[max(address.start() - 40, 0) : address.start()].split(None)
        if before and _SCHEME.fullmatch(before[-1]):
            start, stop = np.searchsorted(places, address.span())
            inside[start:stop] = True
    return inside


def _keep_inner_edges(kinds: NDArray[np.uint8], boundaries: NDArray[np.bool_]) -> None:
    """Remove the boundaries around runs of punctuation that have a word on both sides."""
    edges = np.flatnonzero(kinds & EDGE)
    if not len(edges):
        return
    first = np.flatnonzero(np.diff(edges, prepend=-2) != 1)
    lengths = np.diff(first, append=len(edges))
    before, after = edges[first] - 1, edges[first + lengths - 1] + 1
    # A run at the beginning or the end of the text has no word there, which no other place is mistaken for.
    inner = (before >= 0) & (after < len(kinds))
    inner[inner] = kinds[before[inner]] & kinds[after[inner]] & CORE != 0
    within = edges[np.repeat(inner, lengths)]
    boundaries[within] = boundaries[within + 1] = False


@cache
def _powers() -> tuple[Hashes, Hashes]:
    """Return the powers of the base for a block, and their inverses modulo 2^64."""
    return _geometric(_BASE), _geometric(pow(_BASE, -1, _MODULUS))


def _geometric(base: int) -> Hashes:
    factors = np.full(_BLOCK, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)
