"""Several datasets as one source of windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from llama_ray.data.dataset.batch import Batch
from llama_ray.data.dataset.token_dataset import TokenDataset
from llama_ray.data.mixtures.order import Numbers, Source
from llama_ray.data.mixtures.sources import ONLY_SOURCE
from llama_ray.data.mixtures.weights import shares


class Mixture:
    """The same split of one or more datasets, by the names of the sources, which are sorted and count from 0.

    A *window* is `seq_len + 1` consecutive tokens of a dataset, `seq_len` being the longest of the run.
    """

    def __init__(
        self,
        datasets: Mapping[str, TokenDataset],
        weights: Mapping[str, float] | None = None,
        *,
        documents: bool = False,
    ) -> None:
        """Without `weights`, sources are weighted by their size; for `documents` see `TokenDataset.windows`."""
        self.datasets = {name: datasets[name] for name in sorted(datasets)}
        self._weights, self._documents = weights, documents

    @classmethod
    def of(cls, dataset: TokenDataset, *, documents: bool = False) -> Mixture:
        """Return the mixture of one dataset."""
        return cls({ONLY_SOURCE: dataset}, documents=documents)

    @property
    def names(self) -> list[str]:
        """The names of the sources, by number."""
        return list(self.datasets)

    def sources(self, seq_len: int) -> list[Source]:
        """Return the sources with their numbers of windows."""
        return [Source(name, dataset.num_windows(seq_len)) for name, dataset in self.datasets.items()]

    def shares(self, seq_len: int) -> dict[str, int]:
        """Return the share of each source, see `weights.shares`. Raises ValueError where no source has a window."""
        if self._weights is not None:
            return shares(self._weights)
        sizes = {source.name: source.num_windows for source in self.sources(seq_len)}
        if not any(sizes.values()):
            tokens = sum(len(dataset) for dataset in self.datasets.values())
            raise ValueError(
                f"the training split holds {tokens} tokens, and no sample of {seq_len} tokens; use more data, or lower "
                "max_seq_len"
            )
        return shares(sizes)

    def windows(self, sources: Numbers, indices: Numbers, seq_len: int) -> Batch:
        """Return window `indices[i]` of source number `sources[i]` as row i of a batch."""
        datasets = list(self.datasets.values())
        if len(datasets) == 1:
            return datasets[0].windows(indices, seq_len, self._documents)
        order = np.argsort(sources, kind="stable")
        numbers, starts = np.unique(sources[order], return_index=True)
        parts = [
            datasets[number].windows(indices[rows], seq_len, self._documents)
            for number, rows in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True)
        ]
        back = torch.from_numpy(np.argsort(order, kind="stable"))
        return Batch(
            torch.cat([part.inputs for part in parts])[back],
            torch.cat([part.targets for part in parts])[back],
            _joined([part.starts for part in parts], back),
            torch.from_numpy(sources.copy()),
            _joined([part.reference for part in parts], back),
        )


def _joined(parts: Sequence[Tensor | None], back: Tensor) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there)[back] if there else None


def cut(batch: Batch, seq_len: int, first: int, count: int) -> Batch:
    """Cut the rows of `batch` into rows of `seq_len` tokens, and return `count` of these from number `first` on.

    `seq_len` divides the length of the rows. A document that began in an earlier part of its row begins at 0.
    """
    length = batch.inputs.shape[1]
    parts, rows = length // seq_len, slice(first, first + count)
    if parts == 1 and count == len(batch.inputs):
        return batch

    def cut_rows(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, seq_len)[rows].contiguous()

    starts = batch.starts
    if starts is not None:
        offsets = torch.arange(0, length, seq_len, dtype=starts.dtype).repeat(len(starts))[rows]
        starts = (cut_rows(starts) - offsets.unsqueeze(1)).clamp(min=0)
    sources = batch.sources
    if sources is not None:
        sources = sources.repeat_interleave(parts)[rows]
    reference = None if batch.reference is None else cut_rows(batch.reference)
    return Batch(cut_rows(batch.inputs), cut_rows(batch.targets), starts, sources, reference)
