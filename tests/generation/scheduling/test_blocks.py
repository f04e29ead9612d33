from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.generation.scheduling.blocks import SCRATCH, BlockPool

SIZE = 4


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Allocate blocks for `tokens` and publish the full ones."""
    blocks: list[int] = []
    parent = b""
    for start in range(0, len(tokens), SIZE):
        block = pool.allocate()
        assert block is not None
        blocks.append(block)
        part = tokens[start : start + SIZE]
        if len(part) == SIZE:
            parent = pool.publish(block, parent, part)
    return blocks


def test_each_block_is_allocated_once_and_the_scratch_block_never() -> None:
    pool = BlockPool(5, SIZE)
    given = [pool.allocate() for _ in range(4)]
    assert sorted(b for b in given if b is not None) == [1, 2, 3, 4]
    assert SCRATCH not in given
    assert pool.allocate() is None
    pool.release([2])
    assert (pool.available, pool.in_use, pool.allocate()) == (1, 3, 2)


def test_a_prompt_matches_the_full_blocks_of_another_with_the_same_prefix() -> None:
    pool = BlockPool(20, SIZE)
    first = fill(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    assert pool.match([1, 2, 3, 4, 5, 6, 7, 8, 99])[0] == first[:2]
    assert pool.match([1, 2, 3, 4, 5, 6, 7, 0, 9])[0] == first[:1]
    assert pool.match([0, 2, 3, 4, 5, 6, 7, 8, 9])[0] == []
    # The second block's tokens are known, but after another first block.
    assert pool.match([5, 6, 7, 8, 1])[0] == []
    assert pool.match([1, 2, 3, 4])[0] == [], "at least one token must be left to compute"
    pool.release(first)
    assert (pool.in_use, pool.available) == (0, 19)
    blocks, _ = pool.match([1, 2, 3, 4, 5])
    assert blocks == first[:1]
    pool.share(blocks)
    assert (pool.in_use, pool.users(blocks[0])) == (1, 1)


def test_the_least_recently_used_block_is_evicted_first_and_a_suffix_before_its_prefix() -> None:
    pool = BlockPool(5, SIZE)
    old, new = fill(pool, list(range(8))), fill(pool, list(range(100, 108)))
    pool.release(old)
    pool.release(new)
    assert pool.allocate() == old[1]
    assert pool.match(list(range(9)))[0] == old[:1]
    assert pool.allocate() == old[0]
    assert pool.match(list(range(9)))[0] == []
    assert pool.match(list(range(100, 109)))[0] == new
    assert pool.evictions == 2


def test_without_caching_no_block_is_matched() -> None:
    pool = BlockPool(5, SIZE, caching=False)
    pool.release(fill(pool, list(range(8))))
    assert pool.match(list(range(9)))[0] == []
    assert pool.available == 4


def test_the_same_content_is_cached_in_one_block() -> None:
    pool = BlockPool(5, SIZE)
    first, second = fill(pool, [1, 2, 3, 4]), fill(pool, [1, 2, 3, 4])
    pool.release(first)
    pool.release(second)
    assert pool.match([1, 2, 3, 4, 5])[0] == first
    assert pool.available == 4


def test_blocks_with_colliding_digests_match_only_their_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashlib, "blake2b", lambda content, digest_size: hashlib.sha256(b"all alike"))
    pool = BlockPool(5, SIZE)
    blocks = fill(pool, [1, 2, 3, 4])
    assert pool.match([1, 2, 3, 4, 9])[0] == blocks
    assert pool.match([1, 2, 3, 5, 9])[0] == []


prompts = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), max_size=30)


@given(prompts, st.data())
@settings(max_examples=100, deadline=None)
def test_counts_add_up_and_matches_hold_the_tokens_looked_for(
    many: list[list[int]], data: st.DataObject
) -> None:
    pool = BlockPool(9, SIZE)
    content: dict[int, list[int]] = {}
    held: list[list[int]] = []
    for prompt in many:
        blocks, digests = pool.match(prompt)
        assert [content[b] for b in blocks] == [prompt[i * SIZE : (i + 1) * SIZE] for i in range(len(blocks))]
        pool.share(blocks)
        while len(blocks) * SIZE < len(prompt):
            block = pool.allocate()
            if block is None:
                break
            part = prompt[len(blocks) * SIZE : (len(blocks) + 1) * SIZE]
            content[block] = part
            blocks.append(block)
            if len(part) == SIZE:
                digests.append(pool.publish(block, digests[-1] if digests else b"", part))
        held.append(blocks)
        if held and data.draw(st.booleans()):
            pool.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        counts = [sum(b in blocks for blocks in held) for b in range(9)]
        assert [pool.users(b) for b in range(9)] == counts
        assert pool.in_use == sum(c > 0 for c in counts)
        assert pool.in_use + pool.available == 8
