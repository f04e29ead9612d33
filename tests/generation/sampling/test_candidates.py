from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_ray.generation.sampling.candidates import TopCandidates, _by_keys, torch_top_candidates
from tests.generation.helpers import random_logits

# What runs on CUDA is plain torch as well, so that it can be held to the contract here.
IMPLEMENTATIONS = [torch_top_candidates, _by_keys]


def check(logits: Tensor, width: int, top_candidates: TopCandidates) -> None:
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
def test_largest_first_and_equal_ones_by_id(
    top_candidates: TopCandidates,
    rows: int,
    vocab_size: int,
    width: int,
    seed: int,
    levels: int,
    masked: float,
) -> None:
    logits = random_logits(rows, vocab_size, seed=seed)
    if levels:  # few different values, 0 and -0 among them
        logits = (logits * levels / 6).round()
    logits[torch.rand(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) < masked] = -math.inf
    check(logits, min(width, vocab_size), top_candidates)


@pytest.mark.parametrize("top_candidates", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [64, 1024])
def test_a_real_vocabulary_in_bfloat16_has_ties_at_the_edge(
    top_candidates: TopCandidates, width: int
) -> None:
    logits = random_logits(70, 32000).bfloat16().float()
    edge = logits.sort(descending=True).values[:, width - 1 : width + 1]
    assert (edge[:, 0] == edge[:, 1]).any()
    check(logits, width, top_candidates)


@pytest.mark.parametrize("top_candidates", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_row_of_no_use_harms_no_other(top_candidates: TopCandidates, poison: float) -> None:
    logits = random_logits(3, 2000)
    clean, _ = top_candidates(logits, 64)
    logits[1] = poison
    values, ids = top_candidates(logits, 64)
    assert values[[0, 2]].equal(clean[[0, 2]])
    assert ((ids >= 0) & (ids < 2000)).all()
