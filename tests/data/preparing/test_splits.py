from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llama_ray.data.preparing.splits import Range, changes_split, limit_for, number_of, split_of


def test_numbers_are_even_and_depend_on_the_seed_and_the_id_alone() -> None:
    numbers = [number_of(7, f"web/{index}.txt:0") for index in range(10_000)]
    assert numbers == [number_of(7, f"web/{index}.txt:0") for index in range(10_000)]
    assert abs(sum(number < 0.1 for number in numbers) - 1000) < 120
    assert all(0 <= number < 1 for number in numbers)
    assert number_of(8, "web/0.txt:0") != numbers[0]
    # Fixed for all time: another number would move texts from training to validation.
    assert numbers[0] == 0.4990705673355328


@given(st.sets(st.integers(0, 2**53 - 1), min_size=2), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_both_splits_have_a_text_and_few_parts_are_made_again(whole: set[int], fraction: float) -> None:
    numbers = [number / 2**53 for number in whole]
    limit = limit_for(fraction, Range(min(numbers), max(numbers)))
    splits = [split_of(number, limit) for number in numbers]
    assert set(splits) == {"train", "validation"}
    changed = [number for number in numbers if split_of(number, fraction) != split_of(number, limit)]
    assert len(changed) <= 1
    # Each number as a part of its own.
    assert [n for n in numbers if changes_split(Range(n, n), fraction, limit)] == changed
