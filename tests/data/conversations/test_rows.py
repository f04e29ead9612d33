from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ray.data.conversations.rows import pack


@given(st.lists(st.integers(1, 20), max_size=60))
def test_each_example_is_whole_in_one_row_and_few_rows_are_used(lengths: list[int]) -> None:
    rows = pack(lengths, 20)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    sizes = [sum(lengths[number] for number in row) for row in rows]
    assert max(sizes, default=0) <= 20
    # Best fit decreasing: no more than 11/9 of what any packing needs, and 4 (Johnson 1973).
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 20) + 4 or any(length > 10 for length in lengths)
    # No two rows would fit into one.
    assert all(a + b > 20 for i, a in enumerate(sizes) for b in sizes[:i])
    assert pack(lengths, 20) == rows


def test_the_fullest_row_with_room_is_taken() -> None:
    assert pack([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]


def test_what_is_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="an example has 11 tokens; it must have at most 10"):
        pack([3, 11], 10)
