"""What the C library does with memory that tensors on the host have given back."""

from __future__ import annotations

import ctypes

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1  # bytes; the parameters are ints


def keep_freed_memory() -> bool:
    """Let glibc keep the memory of freed tensors for the next step, in this process and from now on.

    By default it returns large blocks to the system, which hands them out again page by page, zeroed: 30,000 to
    120,000 page faults in each step of a 34M model (benchmarks/RESULTS.md). The process stays as large as its
    fullest moment, which it reaches in every step anyway. Blocks above 64 MiB that a thread other than the main one
    asks for still come from the system, unless MALLOC_ARENA_MAX=1 was in the environment when the process started.
    False, and nothing changed, with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(option, _NEVER) for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
