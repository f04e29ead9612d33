"""Weights of sources as whole numbers, so that the order that follows from them is the same on every machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

WHOLE = 2**32
"""What the shares of a mixture sum to."""


def shares(weights: Mapping[str, float]) -> dict[str, int]:
    """Return the share of each source as a whole number; together they are WHOLE, and in proportion to `weights`.

    A share is rounded down or up, up where most is lost (largest remainder); a source without weight has none. Raises
    ValueError for a weight that is negative or not finite, and where all are 0.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight of {name} is {weight}; it must be a number from 0 up")
    total = sum(map(Fraction, weights.values()))
    if not total:
        raise ValueError(f"the weights of {', '.join(weights)} are all 0; give one of them a weight above 0")
    exact = {name: Fraction(weights[name]) * WHOLE / total for name in sorted(weights)}
    found = {name: math.floor(share) for name, share in exact.items()}
    # Below the number of sources, because each lost less than 1.
    left = WHOLE - sum(found.values())
    for name in sorted(exact, key=lambda name: found[name] - exact[name])[:left]:
        found[name] += 1
    return {name: share for name, share in found.items() if share}
