"""Memory in huge pages, for weights, keys and values, which every step reads from end to end."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from llama_ray.utils.integers import ceil_div

_HUGE_PAGE = 2 * 2**20
"""Bytes, on x86-64 and on arm64 with pages of 4 KiB."""
_CHUNK = 32 * _HUGE_PAGE
_ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector."""


class Arena:
    """Allocates tensors next to each other in chunks of memory, in huge pages if the system supports them.

    With pages of 4 KiB, a product with one row is bound by TLB misses: it reads 27 GB/s, and 36 GB/s from huge pages
    (benchmarks/RESULTS.md). A page takes memory only when it is first written. A chunk is freed with its last tensor.
    """

    def __init__(self) -> None:
        self._chunk, self._used = torch.empty(0, dtype=torch.uint8), 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return zeros whose address is a multiple of 64 bytes."""
        size = math.prod(shape) * dtype.itemsize
        start = ceil_div(self._used, _ALIGNMENT) * _ALIGNMENT
        if start + size > len(self._chunk):
            self._chunk, start = _huge_pages(max(size, _CHUNK)), 0
        self._used = start + size
        return self._chunk[start : self._used].view(dtype).view(*shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy."""
        return self.zeros(tensor.shape, tensor.dtype).copy_(tensor)


def _huge_pages(size: int) -> Tensor:
    """Return uint8 zeros [size], aligned to a huge page."""
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # The kernel does not support huge pages.
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE
    return whole[start : start + size]
