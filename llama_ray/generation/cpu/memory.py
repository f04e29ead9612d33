"""Memory in huge pages, for what is read from end to end at each step: weights, keys and values."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from llama_ray.utils.integers import ceil_div

_HUGE_PAGE = 2 * 2**20  # bytes, on x86-64 and on arm64 with pages of 4 KiB
_CHUNK = 32 * _HUGE_PAGE
_ALIGNMENT = 64  # bytes: a cache line, and the widest vector


class Arena:
    """Hands out tensors side by side in chunks of memory, in huge pages where the system has them.

    With pages of 4 KiB a product with one row waits for the translation of addresses rather than for memory: it read
    27 GB/s where it reads 36 in huge pages (benchmarks/RESULTS.md). Pages are only taken when they are first written.
    A chunk is given back with the last tensor in it.
    """

    def __init__(self) -> None:
        self._chunk, self._used = torch.empty(0, dtype=torch.uint8), 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros that begin at a multiple of 64 bytes."""
        size = math.prod(shape) * dtype.itemsize
        start = ceil_div(self._used, _ALIGNMENT) * _ALIGNMENT
        if start + size > len(self._chunk):
            self._chunk, start = _huge_pages(max(size, _CHUNK)), 0
        self._used = start + size
        return self._chunk[start : self._used].view(dtype).view(*shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy."""
        return self.zeros(tensor.shape, tensor.dtype).copy_(tensor)


def _huge_pages(size: int) -> Tensor:
    """`size` bytes of zeros, uint8, from the beginning of a huge page on."""
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE
    return whole[start : start + size]
