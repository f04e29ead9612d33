"""Random numbers that belong to a place, not to a moment: one per (seed, candidate, position)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the step of SplitMix64
_MASK = (1 << 64) - 1
_FEW = (
    8  # numbers that are sooner made one by one: after a step that has emptied the caches arrays take 0.1 ms
)


def uniforms(
    seeds: Sequence[int], candidates: Sequence[int], positions: Sequence[int]
) -> NDArray[np.float32]:
    """One number in [0, 1) for each row, fp32 [rows], each a multiple of 2^-24.

    A counter-based generator: the number is a hash of its three coordinates, so no state is kept and a row draws
    the same whichever rows stand beside it. It is output number `position` of a SplitMix64 (Steele, Lea and
    Flood 2014, "Fast splittable pseudorandom number generators") whose start is hashed from seed and candidate.
    Seeds are taken modulo 2^64.
    """
    return uniforms_from(starts(seeds, candidates), positions)


def starts(seeds: Sequence[int], candidates: Sequence[int]) -> NDArray[np.uint64]:
    """The start of each row's stream, uint64 [rows]: the part of `uniforms` that no position changes."""
    state = _mix(np.array([s & _MASK for s in seeds], dtype=np.uint64) + np.uint64(_GAMMA))
    mixed: NDArray[np.uint64] = _mix(state + np.uint64(_GAMMA) * np.array(candidates, dtype=np.uint64))
    return mixed


def uniforms_from(start: NDArray[np.uint64], positions: Sequence[int]) -> NDArray[np.float32]:
    """`uniforms`, from what `starts` made of seeds and candidates."""
    # 24 bits are all that an fp32 below 1 holds exactly; more would round up to 1.
    if len(positions) <= _FEW:
        bits = [_mix(s + _GAMMA * p & _MASK) >> 40 for s, p in zip(start.tolist(), positions, strict=True)]
        return np.array([b * 2.0**-24 for b in bits], dtype=np.float32)
    mixed: NDArray[np.uint64] = _mix(start + np.uint64(_GAMMA) * np.array(positions, dtype=np.uint64))
    return (mixed >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _mix(z: Any) -> Any:
    """The finaliser of SplitMix64, modulo 2^64, of a number or of an array."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)
