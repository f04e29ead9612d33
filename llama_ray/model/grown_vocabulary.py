"""A stored model with a larger vocabulary: rows that its embedding and head lack are the mean of those that they have.

The mean of all rows gives a new token the probability of an average one, and leaves the others as they are (Hewitt
2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from llama_ray.model.stored_model import EMBEDDING, HEAD, StoredModel, UnreadTensor

_ROWS_AT_ONCE = 8192


def with_vocabulary(stored: StoredModel, vocab_size: int) -> StoredModel:
    """Return `stored` with a vocabulary of `vocab_size` entries, at least those that it has; nothing is read yet."""
    if vocab_size == stored.config.vocab_size:
        return stored
    grown = {
        name: GrownTensor(stored.tensors[name], vocab_size)
        for name in (EMBEDDING, HEAD)
        if name in stored.tensors
    }
    return StoredModel(replace(stored.config, vocab_size=vocab_size), {**stored.tensors, **grown})


class GrownTensor:
    """A matrix whose rows from the stored ones up to `rows` are their mean."""

    def __init__(self, stored: UnreadTensor, rows: int) -> None:
        self._stored = stored
        self.shape = (rows, *stored.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored rows."""
        return self._stored.dtype

    def read(self, region: tuple[slice, ...] | None = None) -> Tensor:
        """Return `region` of the matrix, by default all of it."""
        rows, columns = region or (slice(None), slice(None))
        start, stop, _ = rows.indices(self.shape[0])
        border = min(max(start, self._stored.shape[0]), stop)
        parts = []
        if start < border:
            parts.append(self._stored.read((slice(start, border), columns)))
        if border < stop:
            parts.append(self._mean[columns].expand(stop - border, -1))
        return torch.cat(parts) if parts else self._stored.read((slice(0, 0), columns))

    @cached_property
    def _mean(self) -> Tensor:
        """The mean of the stored rows, the same whatever part of it is asked for."""
        count, width = self._stored.shape
        total = torch.zeros(width, dtype=torch.float64)
        for start in range(0, count, _ROWS_AT_ONCE):
            rows = self._stored.read((slice(start, min(start + _ROWS_AT_ONCE, count)), slice(0, width)))
            total += rows.sum(0, dtype=torch.float64)
        return (total / count).to(self.dtype)
