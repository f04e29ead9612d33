"""Rows of documents, and the heads of their positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def heads(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return [batch, heads, seq, head_dim] of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def starts_of(rows: Sequence[Sequence[int]], seq: int) -> Tensor:
    """Return `Batch.starts` of rows whose documents have these lengths; the last one goes on to the row's end."""
    starts = torch.zeros(len(rows), seq, dtype=torch.int32)
    for row, lengths in enumerate(rows):
        begin = 0
        for length in lengths:
            begin += length
            starts[row, begin:] = begin
    return starts


def documents_of(starts: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (row, begin, end) of each document."""
    for row, begins in enumerate(starts.tolist()):
        edges = [*sorted(set(begins)), len(begins)]
        yield from ((row, begin, end) for begin, end in pairwise(edges))
