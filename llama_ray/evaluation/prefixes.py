"""In which order prompts that begin alike are computed, so that each beginning is computed once."""

from __future__ import annotations

from collections.abc import Sequence


def owners(prompts: Sequence[Sequence[int]], block_size: int) -> list[int | None]:
    """Return for each of `prompts`, which are sorted, the earlier one that first holds what it shares with them.

    Prompts share whole blocks of `block_size` tokens; None for one that shares none. Once the owner is computed, the
    prompt finds its beginning in the cache.
    """
    found: list[int | None] = []
    # Prompts on the path of the last one, each with the number of tokens that it shares with its predecessors.
    path: list[tuple[int, int]] = []
    for number, prompt in enumerate(prompts):
        # In sorted order no earlier prompt shares more than the last one.
        shared = _shared(prompts[number - 1], prompt) // block_size * block_size if number else 0
        while path and path[-1][0] >= shared:
            path.pop()
        found.append(path[-1][1] if path and shared else None)
        if not path or not shared:
            path = [(-1, number)]
        else:
            path.append((shared, number))
    return found


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of tokens with which both begin."""
    # Most prompts share either little or nearly all.
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
