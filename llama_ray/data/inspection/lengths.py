"""How long the documents of a dataset are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from llama_ray.data.dataset.files import DatasetFiles

_LONGEST = 2**20
"""Documents beyond this length are counted together."""


@dataclass(frozen=True)
class Lengths:
    """Numbers of documents by their length in tokens: `counts[n]` have `n`, the last one n or more.

    `longest` is the length of the longest document.
    """

    counts: npt.NDArray[np.int64]
    tokens: int
    longest: int

    @classmethod
    def of(cls, files: DatasetFiles, split: str) -> Self:
        """Count the documents of a split, by its index alone."""
        counts = np.zeros(_LONGEST + 1, np.int64)
        longest = 0
        for number, shard in enumerate(files.info.splits[split]):
            borders = np.append(files.starts(split, number), shard.tokens).astype(np.int64)
            lengths = np.diff(borders)
            longest = max(longest, int(lengths.max(initial=0)))
            counts += np.bincount(np.minimum(lengths, _LONGEST), minlength=_LONGEST + 1)
        return cls(counts, files.info.tokens(split), longest)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Tokens a document, on average; 0 if there is none."""
        return self.tokens / max(self.documents, 1)

    def quantile(self, share: float) -> int:
        """Return the length that this `share` of the documents does not exceed."""
        return int(np.searchsorted(np.cumsum(self.counts), share * self.documents))

    def by_power(self) -> list[tuple[int, int, int]]:
        """Return (shortest, longest, number) of the documents between two powers of two, none before the first."""
        occupied = np.flatnonzero(self.counts)
        if not len(occupied):
            return []
        first, last = int(occupied[0]).bit_length(), int(occupied[-1]).bit_length()
        bins = [(1 << bits - 1, (1 << bits) - 1) for bits in range(max(first, 1), last + 1)]
        return [(low, high, int(self.counts[low : high + 1].sum())) for low, high in bins]
