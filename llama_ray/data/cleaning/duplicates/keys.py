"""Files of keys: those of the texts of one part of a corpus, sorted, so that a range of them is read and no more.

A file is an array of records (key, row), [bands, texts], each band sorted by key and then by row: the place of the text
in its part.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llama_ray.data.cleaning.duplicates.signatures import BANDS, exact_key, sign
from llama_ray.storage.atomic import replacing

Method = Literal["exact", "minhash"]
Keys = NDArray[Any]
"""Keys of texts: uint64, or 16 bytes as `S16`."""


def keys_of(text: str, method: Method) -> Keys:
    """Return the keys of a text, [bands]; texts that share the key of a band are duplicates."""
    return np.array([exact_key(text)], "S16") if method == "exact" else sign(text)


def write_keys(path: Path, keys: Sequence[Keys], method: Method) -> None:
    """Write the file of a part, given the keys of its texts in their order."""
    none = np.zeros((1, 0), "S16") if method == "exact" else np.zeros((BANDS, 0), np.uint64)
    columns = np.stack(keys, axis=1) if keys else none
    records = np.empty(columns.shape, [("key", columns.dtype), ("row", "<u4")])
    for band, column in enumerate(columns):
        rows = np.argsort(column, kind="stable")
        records[band]["key"] = column[rows]
        records[band]["row"] = rows
    with replacing(path) as file:
        np.save(file, records)


def open_keys(path: Path) -> NDArray[np.void]:
    """Map a file of keys into memory."""
    records: NDArray[np.void] = np.load(path, mmap_mode="r")
    return records


def in_range(band: NDArray[np.void], index: int, count: int) -> NDArray[np.void]:
    """Return the records of a sorted band whose keys are in range `index` of `count`; others are not read."""
    keys = band["key"]
    start, stop = (bisect_left(keys, _limit(keys.dtype, edge, count)) for edge in (index, index + 1))
    return band[start : len(band) if index + 1 == count else stop]


def _limit(dtype: np.dtype[Any], edge: int, count: int) -> Any:
    """Return the smallest key at or above `edge` / `count` of all."""
    limit = min(-(-(edge << 64) // count), 2**64 - 1)
    return np.uint64(limit) if dtype.kind == "u" else np.bytes_(limit.to_bytes(8, "big"))
