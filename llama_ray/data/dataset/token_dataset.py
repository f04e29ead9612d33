"""One split of a dataset as windows of equal length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from llama_ray.data.dataset.batch import IGNORE_INDEX, Batch
from llama_ray.data.dataset.info import read_info
from llama_ray.data.dataset.shards import PREPARE_AGAIN, DatasetError, OpenShard, open_shard

_MAX_OPEN_SHARDS = 512
"""Each shard that is open takes a file descriptor, of which a process may have 1024."""


class TokenDataset:
    """One split of a prepared dataset, memory-mapped; threads may share it.

    The shards of the split follow each other without a gap. A window of `seq_len` is `seq_len + 1` consecutive tokens,
    of which the last is the next window's first: the last target of the one, the first input of the other.
    """

    def __init__(self, directory: str | Path, split: str) -> None:
        """Raises DatasetError for a directory, split or shard that is missing or damaged."""
        self.directory = Path(directory)
        self.split = split
        self.info = read_info(directory)
        if split not in self.info.splits:
            raise DatasetError(
                f"{directory} has no split {split!r}; choose one of {', '.join(sorted(self.info.splits))}"
            )
        self.vocab_size = self.info.vocab_size
        self._shards = self.info.splits[split]
        self._ends = np.cumsum([shard.tokens for shard in self._shards], dtype=np.int64)
        self._open = lru_cache(_MAX_OPEN_SHARDS)(self._open_shard)
        for number, shard in enumerate(self._shards):
            path = self.directory / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                # Says what is wrong with it.
                self._open_shard(number)

    def __len__(self) -> int:
        """Number of tokens."""
        return self.info.tokens(self.split)

    @property
    def fingerprint(self) -> str:
        """Identifies the tokens of all splits."""
        return self.info.content_fingerprint

    def num_windows(self, seq_len: int) -> int:
        """Return the number of windows of `seq_len` tokens in the split."""
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}; it must be at least 1")
        return max(len(self) - 1, 0) // seq_len

    def windows(self, indices: npt.NDArray[np.integer], seq_len: int, documents: bool = True) -> Batch:
        """Return the windows `indices` as one batch, a row each.

        With `documents`, the batch says where they begin, and the last token of a document has no target. The targets
        that the loss mask of the data leaves out are IGNORE_INDEX in any case.
        """
        rows = _Rows.empty(len(indices), seq_len + 1)
        for row, index in enumerate(indices.tolist()):
            self._fill(rows, row, index * seq_len)
        targets = rows.tokens[:, 1:].copy()
        if rows.untrained is not None:
            targets[rows.untrained[:, 1:]] = IGNORE_INDEX
        inputs = torch.from_numpy(np.ascontiguousarray(rows.tokens[:, :-1]))
        if not documents:
            return Batch(inputs, torch.from_numpy(targets))
        targets[rows.starts[:, 1:] > 0] = IGNORE_INDEX
        starts = np.maximum.accumulate(rows.starts[:, :-1], axis=1)
        return Batch(inputs, torch.from_numpy(targets), torch.from_numpy(starts))

    def _fill(self, rows: _Rows, row: int, start: int) -> None:
        """Fill a row with the tokens from `start` on, which may lie in several shards."""
        column, width = 0, rows.tokens.shape[1]
        shard = int(self._ends.searchsorted(start, side="right"))
        while column < width:
            offset = start + column - (int(self._ends[shard - 1]) if shard else 0)
            count = min(width - column, self._shards[shard].tokens - offset)
            rows.fill(row, column, self._open(shard), offset, offset + count)
            column, shard = column + count, shard + 1

    def _open_shard(self, number: int) -> OpenShard:
        expected = self._shards[number]
        path = self.directory / expected.file
        shard = open_shard(path)
        if (len(shard.tokens), len(shard.starts)) != (expected.tokens, expected.documents):
            raise DatasetError(
                f"{path} holds {len(shard.tokens)} tokens; dataset.json says {expected.tokens}; {PREPARE_AGAIN}"
            )
        return shard


@dataclass
class _Rows:
    """Rows of tokens while they are collected, all of [rows, width].

    `starts` holds the column of each document's first token there, and 0 elsewhere. `untrained` is None as long as all
    tokens are to be learned.
    """

    tokens: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int32]
    untrained: npt.NDArray[np.bool_] | None = None

    @classmethod
    def empty(cls, rows: int, width: int) -> _Rows:
        return cls(np.empty((rows, width), np.int64), np.zeros((rows, width), np.int32))

    def fill(self, row: int, column: int, shard: OpenShard, start: int, stop: int) -> None:
        """Copy the tokens of `shard` from `start` to `stop` to `column` and what follows."""
        self.tokens[row, column : column + stop - start] = shard.tokens[start:stop]
        first, last = shard.starts.searchsorted(np.array([start, stop], dtype=shard.starts.dtype))
        borders = shard.starts[first:last].astype(np.int64) + (column - start)
        self.starts[row, borders] = borders
        learned = shard.mask_of(start, stop)
        if learned is not None:
            if self.untrained is None:
                self.untrained = np.zeros(self.tokens.shape, np.bool_)
            self.untrained[row, column : column + stop - start] = ~learned
