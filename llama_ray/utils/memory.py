"""Out-of-memory errors, and giving back memory that is free again."""

from __future__ import annotations

import ctypes
import gc

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that a device or the host has run out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def release_memory() -> None:
    """Give back to the system what nothing refers to any more."""
    gc.collect()
    trim_heap()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trim_heap() -> None:
    """Give back to the system what has been freed; glibc keeps freed tensors of up to 32 MiB for later ones."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
