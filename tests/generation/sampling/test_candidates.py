from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_ray.generation.sampling.candidates import (
    TopCandidates,
    top_candidates_by_keys,
    torch_top_candidates,
)
from tests.generation.helpers import random_logits

# The implementation for CUDA is plain torch, too, so it can be tested here.
IMPLEMENTATIONS = [torch_top_candidates, top_candidates_by_keys]


def assert_contract(logits: Tensor, width: int, top_candidates: TopCandidates) -> None:
    values, ids = top_candidates(logits, width)
    assert values.dtype == torch.float32
    assert ids.dtype == torch.int64
    for row, top, at in zip(logits.tolist(), values.tolist(), ids.tolist(), strict=True):
        expected = sorted(range(len(row)), key=lambda token: (-row[token], token))[:width]
        assert top == [row[token] for token in expected]
        count = sum(value > -math.inf for value in top)
        assert at[:count] == expected[:count]
        assert all(0 <= token < len(row) for token in at)


@pytest.mark.parametrize("top_candidates", IMPLEMENTATIONS)
@given(
    rows=st.integers(1, 5),
    vocab_size=st.integers(1, 700),
    width=st.integers(1, 700),
    seed=st.integers(0, 1000),
    levels=st.sampled_from([0, 1, 3, 40]),
    masked=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
)
@settings(max_examples=100, deadline=None)
def test_candidates_are_the_largest_first_and_equal_ones_by_id(
    top_candidates: TopCandidates,
    rows: int,
    vocab_size: int,
    width: int,
    seed: int,
    levels: int,
    masked: float,
) -> None:
    logits = random_logits(rows, vocab_size, seed=seed)
    if levels:
        # Few different values, 0 and -0 among them.
        logits = (logits * levels / 6).round()
    logits[torch.rand(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) < masked] = -math.inf
    assert_contract(logits, min(width, vocab_size), top_candidates)


@pytest.mark.parametrize("top_candidates", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [64, 1024])
def test_ties_at_the_last_candidate_go_to_the_lower_id(top_candidates: TopCandidates, width: int) -> None:
    logits = random_logits(70, 32000).bfloat16().float()
    last, next_one = logits.sort(descending=True).values[:, width - 1 : width + 1].unbind(-1)
    assert (last == next_one).any()
    assert_contract(logits, width, top_candidates)


@pytest.mark.parametrize("top_candidates", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_changes_no_other_row(top_candidates: TopCandidates, poison: float) -> None:
    logits = random_logits(3, 2000)
    clean, _ = top_candidates(logits, 64)
    logits[1] = poison
    values, ids = top_candidates(logits, 64)
    assert values[[0, 2]].equal(clean[[0, 2]])
    assert ((ids >= 0) & (ids < 2000)).all()
