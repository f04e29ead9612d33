"""Random numbers addressed by their coordinates: one for each (seed, candidate, position, token).

A counter-based generator: each number is a hash of its coordinates, so there is no state, and a row draws the same
numbers whatever else is in the batch. The hash is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
number generators"), chained three times: (seed, candidate) gives a stream key, (stream key, position) a noise key, and
(noise key, token) the number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama_ray.utils.integers import GOLDEN_GAMMA, SPLITMIX64_FACTORS, splitmix64

_MASK = (1 << 64) - 1
# Up to this many keys are computed as Python integers: with the CPU caches cold after a step, NumPy takes 0.1 ms.
_MAX_SCALAR_KEYS = 8


def stream_keys(seeds: Sequence[int], candidates: Sequence[int]) -> NDArray[np.uint64]:
    """Return the key of each row's stream of positions, uint64 [rows]. Seeds are taken modulo 2^64."""
    state = splitmix64(np.array([s & _MASK for s in seeds], dtype=np.uint64) + np.uint64(GOLDEN_GAMMA))
    keys: NDArray[np.uint64] = splitmix64(
        state + np.uint64(GOLDEN_GAMMA) * np.array(candidates, dtype=np.uint64)
    )
    return keys


def noise_keys(streams: NDArray[np.uint64], positions: Sequence[int]) -> Tensor:
    """Return the key of each row's noise at its position: 64 bits as int64 [rows, 1], on the host.

    `streams` holds the rows' `stream_keys`.
    """
    if len(positions) <= _MAX_SCALAR_KEYS:
        pairs = zip(streams.tolist(), positions, strict=True)
        bits = np.array([splitmix64(s + GOLDEN_GAMMA * p & _MASK) for s, p in pairs], dtype=np.uint64)
    else:
        bits = splitmix64(streams + np.uint64(GOLDEN_GAMMA) * np.array(positions, dtype=np.uint64))
    return torch.from_numpy(bits.view(np.int64))[:, None]


def exponentials(keys: Tensor, tokens: Tensor) -> Tensor:
    """Return exponentially distributed numbers of mean 1, fp64 [rows, n], for tokens int64 [rows, n] or [n].

    `keys` are `noise_keys` [rows, 1]. Each number is -log(1 - v), with v uniform of 52 bits and never 0 or 1.
    """
    bits = _splitmix64_tensor(keys + _signed(GOLDEN_GAMMA) * tokens)
    v = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52
    return torch.log1p(-v).neg_()


def _splitmix64_tensor(z: Tensor) -> Tensor:
    """Apply `splitmix64` to int64, whose products wrap around."""
    z = (z ^ _shift_right(z, 30)) * _signed(SPLITMIX64_FACTORS[0])
    z = (z ^ _shift_right(z, 27)) * _signed(SPLITMIX64_FACTORS[1])
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift int64 logically, filling with zeros; torch's own shift copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits
