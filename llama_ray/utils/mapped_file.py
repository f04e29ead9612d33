"""A file in memory, as the pages of it that are read."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Number = TypeVar("Number", bound=np.number)

_FAILED = ctypes.c_void_p(-1).value


class MappedFile:
    """Maps the file `path` of `size` bytes, read-only.

    Unlike `mmap.mmap` and `numpy.memmap` it keeps no file descriptor, of which a process may often have 1024 only: a
    dataset may have thousands of shards.
    """

    def __init__(self, path: Path, size: int) -> None:
        """Raise OSError for a file that cannot be mapped, such as an empty one."""
        self.size = size
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        descriptor = os.open(path, os.O_RDONLY)
        try:
            address = self._libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        finally:
            os.close(descriptor)
        if address in (None, _FAILED):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(path))
        self._address = int(address)
        # Arrays refer to it, so that the pages go when the last array goes.
        self._bytes = (ctypes.c_ubyte * size).from_address(self._address)
        weakref.finalize(self._bytes, self._libc.munmap, self._address, size)

    def array(self, dtype: np.dtype[Number], count: int, offset: int) -> npt.NDArray[Number]:
        """Return `count` numbers from the byte `offset` on; not writable."""
        array = np.frombuffer(memoryview(self._bytes), dtype, count, offset)
        array.flags.writeable = False
        return array

    def will_need(self, start: int, stop: int) -> None:
        """Have the system read the bytes from `start` to `stop` in the background."""
        start -= start % mmap.PAGESIZE
        self._libc.madvise(self._address + start, stop - start, mmap.MADV_WILLNEED)
