"""A pseudo-random order of numbers that needs no memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llama_ray.utils.integers import splitmix64


class Permutation:
    """A pseudo-random permutation of `range(size)` that needs no memory, whatever the size.

    A Feistel network (Luby and Rackoff, "How to construct pseudorandom permutations", 1988) permutes the numbers below
    the next power of four. Results of `size` and above are permuted again until they are below (cycle walking: Black
    and Rogaway, "Ciphers with arbitrary finite domains", 2002), on average fewer than four times.
    """

    # Four rounds suffice for a strong round function and a large domain; small domains mix better with more.
    ROUNDS = 8

    def __init__(self, size: int, *key: int) -> None:
        """Permute `range(size)`; each `key`, of whole numbers from 0 up, makes another permutation."""
        self.size = size
        half = max((size - 1).bit_length() + 1, 2) // 2
        self._half = np.uint64(half)
        self._mask = np.uint64(2**half - 1)
        self._keys = np.random.SeedSequence(key).generate_state(self.ROUNDS, np.uint64)

    def __call__(self, positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Return the elements of the permutation at `positions`, which are in `[0, size)`."""
        values = self._network(positions.astype(np.uint64))
        outside = values >= self.size
        while outside.any():
            values[outside] = self._network(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _network(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (splitmix64(right + key) & self._mask)
        return (left << self._half) | right
