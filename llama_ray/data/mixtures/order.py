"""The order of the windows of a mixture: a pure function of a few integers, without an index.

Positions count from the beginning of a run. A *phase* is a range of positions with the same shares. It is cut into
blocks of BLOCK places. How many of a block's places each source gets follows from its shares (`_places`), and a
permutation mixes them. The n-th place of a source holds window `n % N` of the source's epoch `n // N`, in an order that
is another permutation for each epoch. So every source goes on where it was when a phase ends, and each of its epochs
holds each of its N windows exactly once.

What is known of a position depends on nothing after it: a longer run, and phases and sources that come later, leave it
as it is.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from llama_ray.data.mixtures.permutation import Permutation
from llama_ray.data.mixtures.weights import WHOLE

BLOCK = 1024
"""Places whose sources are drawn together. A prefix of a phase of k places holds at most BLOCK / 4 places more or less
of a source than its share of k, and fewer than the number of sources where it ends with a block."""

# What a permutation is of, so that no two have the same key.
_PLACES, _WINDOWS = 0, 1

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """A source of windows. Its order depends on its name, not on its number among others."""

    name: str
    num_windows: int


@dataclass(frozen=True)
class Phase:
    """From position `start` on, sources have these shares of the places; they sum to WHOLE."""

    start: int
    shares: Mapping[str, int]


@dataclass(frozen=True)
class _Block:
    """For each place of a block: the number of its source, and how many places before it have the same source."""

    sources: Numbers
    ordinals: Numbers


class Order:
    """Which window of which source stands at each position.

    `sources` are sorted by name. `phases` are sorted by start, and the first one starts at 0. Of phases that start at
    the same position the last one counts; one with the shares of the phase before it continues that one.
    """

    def __init__(self, sources: Sequence[Source], phases: Sequence[Phase], seed: int) -> None:
        """Raises ValueError for a negative seed, and for a source that is to be used and has no window."""
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be at least 0")
        self.sources = tuple(sorted(sources, key=lambda source: source.name))
        self._seed = seed
        self._phases = _distinct(phases)
        self._starts = [phase.start for phase in self._phases]
        self._shares = [
            [phase.shares.get(source.name, 0) for source in self.sources] for phase in self._phases
        ]
        for source, of_phases in zip(self.sources, zip(*self._shares, strict=True), strict=True):
            if any(of_phases) and not source.num_windows:
                raise ValueError(f"source {source.name} holds no window; give it more data, or no weight")
        self._keys = [_key(source.name) for source in self.sources]
        # A global batch may reach into the next block, and a source's next epoch.
        self._block = lru_cache(maxsize=4)(self._make_block)
        self._permutation = lru_cache(maxsize=2 * len(self.sources))(self._make_permutation)
        self._before = [[0] * len(self.sources)]
        for number in range(1, len(self._phases)):
            self._before.append(self._counts_in(number - 1, self._starts[number] - self._starts[number - 1]))

    def windows(self, first: int, count: int) -> tuple[Numbers, Numbers]:
        """Return, for `count` positions from `first` on, the number of the source, and the window in it."""
        sources = np.empty(count, dtype=np.int64)
        ordinals = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            number, place = self._place(first + done)
            block, offset = divmod(place, BLOCK)
            taken = min(BLOCK - offset, count - done, self._end(number) - first - done)
            table, before = self._block(number, block), self._counts_before_block(number, block)
            of_block, here = slice(offset, offset + taken), slice(done, done + taken)
            sources[here] = table.sources[of_block]
            ordinals[here] = table.ordinals[of_block] + np.array(before, dtype=np.int64)[sources[here]]
            done += taken
        return sources, self._windows_of(sources, ordinals)

    def counts(self, position: int) -> list[int]:
        """Return how many of the positions before `position` each source has."""
        if position == 0:
            return [0] * len(self.sources)
        number, place = self._place(position - 1)
        return self._counts_in(number, place + 1)

    def _place(self, position: int) -> tuple[int, int]:
        """Return the number of the phase of `position`, and the place in it."""
        number = bisect_right(self._starts, position) - 1
        return number, position - self._starts[number]

    def _end(self, number: int) -> int:
        return self._starts[number + 1] if number + 1 < len(self._starts) else 2**63

    def _counts_in(self, number: int, places: int) -> list[int]:
        """Return the places of each source from position 0 to the first `places` of a phase."""
        block, rest = divmod(places, BLOCK)
        counts = self._counts_before_block(number, block)
        if rest:
            used = np.bincount(self._block(number, block).sources[:rest], minlength=len(counts))
            counts = [count + int(more) for count, more in zip(counts, used, strict=True)]
        return counts

    def _counts_before_block(self, number: int, block: int) -> list[int]:
        in_phase = _places(block * BLOCK, self._shares[number])
        return [before + count for before, count in zip(self._before[number], in_phase, strict=True)]

    def _make_block(self, number: int, block: int) -> _Block:
        shares = self._shares[number]
        before, after = _places(block * BLOCK, shares), _places((block + 1) * BLOCK, shares)
        ends = np.cumsum(np.array(after) - np.array(before))
        places = Permutation(BLOCK, self._seed, _PLACES, number, block)(np.arange(BLOCK, dtype=np.uint64))
        sources = np.searchsorted(ends, places, side="right").astype(np.int64)
        ordinals = np.empty(BLOCK, dtype=np.int64)
        for source in range(len(shares)):
            mine = sources == source
            ordinals[mine] = np.arange(np.count_nonzero(mine))
        return _Block(sources, ordinals)

    def _windows_of(self, sources: Numbers, ordinals: Numbers) -> Numbers:
        """Return the window that each source has as its `ordinals`-th one."""
        windows = np.empty(len(sources), dtype=np.int64)
        for source in np.unique(sources).tolist():
            mine = np.flatnonzero(sources == source)
            epochs, places = np.divmod(ordinals[mine], self.sources[source].num_windows)
            for epoch in np.unique(epochs).tolist():
                now = epochs == epoch
                windows[mine[now]] = self._permutation(source, epoch)(places[now].astype(np.uint64))
        return windows

    def _make_permutation(self, source: int, epoch: int) -> Permutation:
        num_windows = self.sources[source].num_windows
        return Permutation(num_windows, self._seed, _WINDOWS, self._keys[source], epoch)


def _places(count: int, shares: Sequence[int]) -> list[int]:
    """Divide the first `count` places of a phase among sources with these shares, which sum to WHOLE.

    The first source has its share of all places, rounded down; the second its share of those that are left; and so on.
    One place more is one more for exactly one source, so nobody's count ever falls. The s-th source, from 1, has less
    than s places more or less than its share. A source without a share changes nothing for the others.
    """
    found = []
    left, whole = count, WHOLE
    for share in shares:
        taken = left * share // whole if whole else 0
        found.append(taken)
        left, whole = left - taken, whole - share
    return found


def _distinct(phases: Sequence[Phase]) -> list[Phase]:
    kept: list[Phase] = []
    for phase in phases:
        if not kept or kept[-1].shares != phase.shares:
            kept.append(phase)
    return kept


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
