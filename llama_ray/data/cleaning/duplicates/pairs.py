"""Pairs of texts with an equal key, found range by range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama_ray.data.cleaning.duplicates.keys import in_range, open_keys
from llama_ray.storage.atomic import replacing

RANGE_TEXTS = 4_000_000
"""Texts that one range of keys holds on average: some hundred megabytes of memory."""

Pairs = NDArray[np.uint64]
"""Pairs of text numbers, [pairs, 2], the smaller one first."""


@dataclass(frozen=True)
class KeyRange:
    """Range number `index` of `count` equal ones of the keys of a band: the work of one call of `find_pairs`."""

    band: int
    index: int
    count: int


def text_number(part: int, row: int) -> int:
    """Return the number of a text, by which the first of duplicates is found: parts in order, rows in order."""
    return part << 32 | row


def plan(key_files: Sequence[Path], range_texts: int = RANGE_TEXTS) -> list[KeyRange]:
    """Return the ranges to look at in these files; each has other pairs, and together they have all."""
    shapes = [open_keys(path).shape for path in key_files]
    bands = shapes[0][0] if shapes else 0
    count = max(1, -(-sum(texts for _, texts in shapes) // range_texts))
    return [KeyRange(band, index, count) for band in range(bands) for index in range(count)]


def find_pairs(key_files: Sequence[Path], span: KeyRange, output: Path) -> int:
    """Write the pairs of a range, each text with the first one that has the same key, and return their number.

    `key_files` holds the file of each part, in the order of the parts. Memory is that of the keys in the span.
    """
    keys, numbers = [], []
    for part, path in enumerate(key_files):
        records = in_range(open_keys(path)[span.band], span.index, span.count)
        keys.append(np.ascontiguousarray(records["key"]))
        numbers.append(records["row"].astype(np.uint64) | np.uint64(part << 32))
    pairs = _equal_pairs(np.concatenate(keys), np.concatenate(numbers))
    with replacing(output) as file:
        np.save(file, pairs)
    return len(pairs)


def _equal_pairs(keys: NDArray[np.generic], numbers: NDArray[np.uint64]) -> Pairs:
    # A stable order: of equal keys the smallest number comes first, as in the files.
    order = np.argsort(keys, kind="stable")
    keys, numbers = keys[order], numbers[order]
    again = np.zeros(len(keys), np.bool_)
    again[1:] = keys[1:] == keys[:-1]
    first = np.maximum.accumulate(np.where(again, 0, np.arange(len(keys))))
    return np.stack([numbers[first[again]], numbers[again]], axis=1)
