from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llama_ray.evaluation.prefixes import owners


def shared(a: list[int], b: list[int], block_size: int) -> int:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return same // block_size * block_size


@given(st.lists(st.lists(st.integers(0, 1), max_size=9), max_size=12), st.integers(1, 3))
def test_the_owner_is_the_first_prompt_that_holds_the_most_blocks_of_a_later_one(
    prompts: list[list[int]], block_size: int
) -> None:
    prompts = sorted(prompts)
    for number, owner in enumerate(owners(prompts, block_size)):
        blocks = [shared(earlier, prompts[number], block_size) for earlier in prompts[:number]]
        most = max(blocks, default=0)
        assert owner == (blocks.index(most) if most else None)
