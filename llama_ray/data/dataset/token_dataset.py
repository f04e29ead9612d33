"""One split of a dataset as samples of equal length."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from llama_ray.data.dataset.batch import Batch
from llama_ray.data.dataset.shards import DatasetError, content_fingerprint, open_shard, read_info


class TokenDataset:
    """One split of a prepared dataset, memory-mapped.

    A sample of `seq_len` is `seq_len + 1` consecutive tokens of one shard. Consecutive samples overlap by one token,
    the last target of the first and the first input of the second. The rest at the end of a shard is not used.
    """

    def __init__(self, directory: str | Path, split: str) -> None:
        """Open all shards. Raises DatasetError for a directory, split or shard that is missing or damaged."""
        self.directory = Path(directory)
        self.split = split
        self.info = read_info(directory)
        if split not in self.info.splits:
            raise DatasetError(
                f"{directory} has no split {split!r}; choose one of {', '.join(sorted(self.info.splits))}"
            )
        self.vocab_size = self.info.vocab_size
        self._shards = []
        for shard in self.info.splits[split]:
            tokens = open_shard(self.directory / shard.file)
            if len(tokens) != shard.tokens:
                raise DatasetError(
                    f"{self.directory / shard.file} holds {len(tokens)} tokens; dataset.json says {shard.tokens}; "
                    "prepare the data again (--overwrite)"
                )
            self._shards.append(tokens)
        self._lengths = np.array([len(tokens) for tokens in self._shards] or [0], dtype=np.int64)

    def __len__(self) -> int:
        """Number of tokens."""
        return self.info.tokens(self.split)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the tokens of all splits; see `content_fingerprint`."""
        return content_fingerprint(self.directory, self.info)

    def num_samples(self, seq_len: int) -> int:
        """Return the number of samples of `seq_len` tokens in the split."""
        return int(self._sample_ends(seq_len)[-1])

    def samples(self, indices: npt.NDArray[np.int64], seq_len: int) -> Batch:
        """Return the samples `indices` as one batch."""
        ends = self._sample_ends(seq_len)
        shards = np.searchsorted(ends, indices, side="right")
        samples = np.empty((len(indices), seq_len + 1), dtype=np.int64)
        for sample, shard, index in zip(samples, shards, indices, strict=True):
            before = ends[shard - 1] if shard else 0
            start = int(index - before) * seq_len
            sample[:] = self._shards[shard][start : start + seq_len + 1]
        tokens = torch.from_numpy(samples)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def _sample_ends(self, seq_len: int) -> npt.NDArray[np.int64]:
        """Return, for each shard, the number of samples up to its end."""
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}; it must be at least 1")
        return np.cumsum(np.maximum(self._lengths - 1, 0) // seq_len)
