"""Random numbers that belong to a place, not to a moment: one for each seed, candidate, position and token.

A counter-based generator: a number is a hash of its coordinates, so no state is kept and a row draws the same whichever
rows stand beside it. The hash is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators"), three times over: a seed and a candidate give the start of a stream, its output number `position` gives
the start of another, and that one's output number `token` is the number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama_ray.utils.integers import GOLDEN_GAMMA, SPLITMIX64_FACTORS, splitmix64

_MASK = (1 << 64) - 1
_FEW = (
    8  # numbers that are sooner made one by one: after a step that has emptied the caches arrays take 0.1 ms
)


def starts(seeds: Sequence[int], candidates: Sequence[int]) -> NDArray[np.uint64]:
    """The start of each row's stream of positions, uint64 [rows]. Seeds are taken modulo 2^64."""
    state = splitmix64(np.array([s & _MASK for s in seeds], dtype=np.uint64) + np.uint64(GOLDEN_GAMMA))
    mixed: NDArray[np.uint64] = splitmix64(
        state + np.uint64(GOLDEN_GAMMA) * np.array(candidates, dtype=np.uint64)
    )
    return mixed


def places(start: NDArray[np.uint64], positions: Sequence[int]) -> Tensor:
    """The start of each row's stream of tokens at its position: 64 bits as int64 [rows, 1], on the host."""
    if len(positions) <= _FEW:
        pairs = zip(start.tolist(), positions, strict=True)
        bits = np.array([splitmix64(s + GOLDEN_GAMMA * p & _MASK) for s, p in pairs], dtype=np.uint64)
    else:
        bits = splitmix64(start + np.uint64(GOLDEN_GAMMA) * np.array(positions, dtype=np.uint64))
    return torch.from_numpy(bits.view(np.int64))[:, None]


def exponentials(place: Tensor, tokens: Tensor) -> Tensor:
    """Exponentially distributed numbers of mean 1, fp64 [rows, n], for tokens int64 [rows, n] or [n].

    -log(1 - v) for a uniform v of 52 bits, which is never 0 or 1.
    """
    bits = _mix_tensor(place + _signed(GOLDEN_GAMMA) * tokens)
    v = (_shifted(bits, 12).double() + 0.5) * 2.0**-52
    return torch.log1p(-v).neg_()


def _mix_tensor(z: Tensor) -> Tensor:
    """The same for int64, whose products wrap around."""
    z = (z ^ _shifted(z, 30)) * _signed(SPLITMIX64_FACTORS[0])
    z = (z ^ _shifted(z, 27)) * _signed(SPLITMIX64_FACTORS[1])
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, with zeros coming in: torch has no such shift."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits
