"""Groups of duplicates: what pairs connect, of which the smallest number stays."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama_ray.data.cleaning.duplicates.pairs import Pairs, text_number
from llama_ray.storage.atomic import replacing

_BUFFERED_PAIRS = 1 << 20


class UnionFind:
    """Joins pairs into groups; memory is proportional to the texts that have a duplicate.

    The result does not depend on the order of the pairs, nor on how they are divided among calls of `add`.
    """

    def __init__(self) -> None:
        self._forest: Pairs = np.zeros((0, 2), np.uint64)
        self._waiting: list[Pairs] = []

    def add(self, pairs: Pairs) -> None:
        """Join the two texts of each pair, [pairs, 2]."""
        self._waiting.append(pairs)
        # Each text is joined again only after as many new pairs, so that the whole takes O(n log n).
        if sum(map(len, self._waiting)) > max(_BUFFERED_PAIRS, len(self._forest)):
            self._join()

    def dropped(self) -> Pairs:
        """Return (text, the one of its group that stays) for each text that does not stay, in order, [texts, 2]."""
        self._join()
        return self._forest

    def _join(self) -> None:
        pairs = np.concatenate([self._forest, *self._waiting])
        self._waiting = []
        numbers, ends = np.unique(pairs, return_inverse=True)
        roots = _components(len(numbers), ends.reshape(-1, 2))
        lower = np.flatnonzero(roots != np.arange(len(numbers)))
        self._forest = np.stack([numbers[lower], numbers[roots[lower]]], axis=1)


def _components(count: int, edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the smallest node that each of `count` nodes is connected with."""
    roots = np.arange(count)
    while True:
        ends = roots[edges]
        low, high = ends.min(axis=1), ends.max(axis=1)
        if np.array_equal(low, high):
            return roots
        np.minimum.at(roots, high, low)
        while not np.array_equal(further := roots[roots], roots):
            roots = further


def resolve(pair_files: Iterable[Path], output: Path) -> int:
    """Write the duplicates among the pairs of these files and return their number."""
    union = UnionFind()
    for path in pair_files:
        union.add(np.load(path))
    dropped = union.dropped()
    with replacing(output) as file:
        np.save(file, np.ascontiguousarray(dropped.T))
    return len(dropped)


class Duplicates:
    """The texts to leave out, as `resolve` wrote them; the file is mapped into memory."""

    def __init__(self, path: Path) -> None:
        self._dropped, self._kept = np.load(path, mmap_mode="r")

    def of_part(self, part: int) -> dict[int, int]:
        """Return the rows of `part` to leave out, each with the number of the text that stays in its place."""
        ends = np.array([text_number(part, 0), text_number(part + 1, 0)], np.uint64)
        start, stop = np.searchsorted(self._dropped, ends)
        rows = self._dropped[start:stop] & np.uint64(2**32 - 1)
        return dict(zip(rows.tolist(), self._kept[start:stop].tolist(), strict=True))
