"""Integer arithmetic."""

from __future__ import annotations

from typing import Any

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""2^64 / golden ratio, by which SplitMix64 increments its state."""
SPLITMIX64_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Multipliers of SplitMix64's finalizer."""
_MASK = (1 << 64) - 1


def ceil_div(a: int, b: int) -> int:
    """Return `a` / `b` rounded up; `b` must be positive."""
    return -(-a // b)


def splitmix64(z: Any) -> Any:
    """Apply the finalizer of SplitMix64, modulo 2^64, to an int or to each element of a uint64 array.

    Each input bit flips about half of the output bits (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
    number generators").
    """
    z = (z ^ (z >> 30)) * SPLITMIX64_FACTORS[0] & _MASK
    z = (z ^ (z >> 27)) * SPLITMIX64_FACTORS[1] & _MASK
    return z ^ (z >> 31)
