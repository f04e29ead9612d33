"""Examples packed into rows of one length, none of them cut."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Return the numbers of the examples of each row, given their lengths.

    Best fit decreasing (Johnson 1973): the longest example comes first, and each goes into the fullest row that has
    room for it. At most 11/9 of the fewest possible rows are used. Raises ValueError for a length above `row_tokens`.
    """
    rows: list[list[int]] = []
    # (room, row), sorted.
    open_rows: list[tuple[int, int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[number]
        if length > row_tokens:
            raise ValueError(
                f"an example has {length} tokens; it must have at most {row_tokens}, those of a row"
            )
        place = bisect_left(open_rows, (length, 0))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
        else:
            room, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(number)
        if room > length:
            insort(open_rows, (room - length, row))
    return sorted(sorted(row) for row in rows)
