from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llama_ray.generation.sampling.bad_words import BadWords

TOKENS = st.lists(st.integers(0, 2), max_size=6)
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=5)


@given(SEQUENCES, TOKENS, TOKENS)
def test_a_token_is_found_if_it_completes_a_sequence(
    sequences: list[list[int]], output: list[int], draft: list[int]
) -> None:
    want = {token for token in range(3) for s in sequences if [*output, *draft, token][-len(s) :] == s}
    assert set(BadWords(sequences).completing(output, draft)) == want


def test_a_word_is_meant_at_the_beginning_and_after_a_space() -> None:
    codes = {"dog": [1, 2], " dog": [3], "cat": [4], " cat": [9]}
    words = BadWords.of([" dog", "cat"], codes.__getitem__, vocab_size=9)
    assert set(words.completing([0])) == {3, 4}
    assert set(words.completing([1])) == {2, 3, 4}
