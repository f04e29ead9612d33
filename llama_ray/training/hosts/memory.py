"""Whether the C library keeps the memory of freed tensors."""

from __future__ import annotations

import ctypes

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# In bytes; the largest int, which is the type of the parameters.
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make glibc keep the memory of freed tensors for the next step, for the rest of this process.

    By default it returns large blocks to the system, which maps and zeroes them page by page at the next allocation:
    30,000 to 120,000 page faults in each step of a 34M model (benchmarks/RESULTS.md). The process then keeps its peak
    size, which it reaches in every step anyway. Allocations above 64 MiB outside the main thread still come from the
    system, unless MALLOC_ARENA_MAX=1 was in the environment when the process started.

    Returns False, and changes nothing, with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(option, _NEVER) for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
