from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.sampling.sampler import Sampler
from tests.generation.helpers import Row, random_logits, sample
from tests.generation.sampling import reference

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 10},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    {"temperature": 2.5, "top_k": 100, "top_p": 0.99, "min_p": 0.01},
]
ANY_PARAMS = st.builds(
    SamplingParams,
    temperature=st.just(0.0) | st.floats(1e-3, 5),
    top_k=st.just(0) | st.integers(0, 300),
    top_p=st.just(1.0) | st.floats(0.01, 1),
    min_p=st.just(0.0) | st.floats(1e-37, 1),
    seed=st.integers(0, 2**63),
)


@given(
    st.lists(ANY_PARAMS, min_size=1, max_size=6),
    st.integers(0, 1000),
    st.integers(1, 300),
    st.sampled_from([0.02, 1.0, 3.0]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_every_row_draws_the_token_of_the_reference(
    params: list[SamplingParams], seed: int, vocab_size: int, scale: float, ties: bool
) -> None:
    logits = random_logits(len(params), vocab_size, seed=seed, scale=scale)
    if ties:
        logits = logits.round()
    rows = [Row(p, prompt=[0] * (i + 1), seed=p.seed or 0, index=i % 3) for i, p in enumerate(params)]
    got = [s.token_id for s in sample(logits, rows)]
    assert got == [reference.draw(of, row) for of, row in zip(logits, rows, strict=True)]


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_a_nucleus_of_any_size_is_found(scale: float) -> None:
    filters = [(0.5, 0, 0), (0.9, 0, 0), (0.999, 0, 0), (0.99, 1000, 0), (0.9, 1500, 0), (0.97, 0, 1e-3)]
    params = [SamplingParams(top_p=p, top_k=k, min_p=m) for p, k, m in filters]
    logits = random_logits(60, 3000, scale=scale)
    rows = [Row(params[i % len(params)], seed=i) for i in range(60)]
    got = [s.token_id for s in sample(logits, rows)]
    assert got == [reference.draw(of, row) for of, row in zip(logits, rows, strict=True)]


@pytest.mark.parametrize("vocab_size", [100, 256, 4096])
def test_greedy_takes_the_first_of_the_largest_in_a_mixed_batch(vocab_size: int) -> None:
    logits = random_logits(6, vocab_size, seed=1)
    logits[2, [vocab_size - 9, 3, 77]] = 50.0
    params = [SamplingParams(temperature=t) for t in (0, 1.0, 0, 0.5, 0, 1e-30)]
    tokens = [s.token_id for s in sample(logits, [Row(p, seed=9) for p in params])]
    # A temperature of almost 0 is greedy in effect.
    greedy = [0, 2, 4, 5]
    assert tokens[2] == 3
    assert [tokens[i] for i in greedy] == logits.argmax(-1)[greedy].tolist()


def test_a_row_gets_the_same_sample_alone_and_in_any_batch() -> None:
    rng = np.random.default_rng(0)
    rows = [
        Row(
            reference.MIXED[i % len(reference.MIXED)],
            prompt=rng.integers(0, 4096, size=1 + i % 20).tolist(),
            output=rng.integers(0, 4096, size=i % 5).tolist(),
            seed=i,
            index=i % 3,
            end_ids=[5],
        )
        for i in range(300)
    ]
    logits = random_logits(300, 4096)
    alone = [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    sampler = Sampler()
    for size in (1, 2, 3, 17, 33, 64, 128, 300) * 3:
        chosen = rng.permutation(300)[:size].tolist()
        got = sampler.sample(logits[chosen], [rows[i] for i in chosen])
        assert got == [alone[i] for i in chosen]


def test_a_sampler_notices_when_its_rows_change() -> None:
    logits, sampler = random_logits(2, 50), Sampler()
    rows = [Row(SamplingParams(), seed=1), Row(SamplingParams(temperature=0), seed=2)]
    for token in range(3):
        assert sample(logits, rows, sampler) == sample(logits, rows)
        for row in rows:
            row.push(token)
    for other in (
        [rows[1], rows[0]],
        [rows[0], Row(SamplingParams(top_k=1), seed=2)],
        [Row(SamplingParams(), seed=3), rows[1]],
        [Row(SamplingParams(), seed=1, index=1), rows[1]],
        rows,
    ):
        assert sample(logits, other, sampler) == sample(logits, other)
    wider = random_logits(2, 80)
    assert sample(wider, rows, sampler) == sample(wider, rows)


@pytest.mark.parametrize("values", FILTERS, ids=str)
def test_samples_follow_the_exact_distribution(values: dict[str, Any]) -> None:
    n, params = 20_000, SamplingParams(**values)
    logits = random_logits(60, seed=3, scale=1.5)
    rows = [Row(params, seed=seed) for seed in range(n)]
    tokens = [s.token_id for s in sample(logits.expand(n, -1), rows)]
    counts = np.bincount(tokens, minlength=60)
    expected = reference.probabilities(logits, params).numpy() * n
    assert counts[expected == 0].sum() == 0
    # The chi-square test needs at least 5 expected samples in a cell: smaller cells are merged.
    small = expected < 5
    observed = np.append(counts[~small], counts[small].sum())
    wanted = np.append(expected[~small], expected[small].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    if len(observed) > 1:
        assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


@pytest.mark.parametrize("values", [{}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9}], ids=str)
def test_similar_logits_often_draw_the_same_token(values: dict[str, Any]) -> None:
    """At least as often as the Gumbel-max trick promises: (1 - d) / (1 + d), with d the total variation distance."""
    n, params = 4000, SamplingParams(**values)
    logits = random_logits(500, scale=2.0)
    pair = [logits, logits + random_logits(500, seed=1, scale=0.3)]
    rows = [Row(params, seed=seed) for seed in range(n)]
    first, second = ([s.token_id for s in sample(x.expand(n, -1), rows)] for x in pair)
    p, q = (reference.probabilities(x, params) for x in pair)
    distance = ((p - q).abs().sum() / 2).item()
    equal = sum(a == b for a, b in zip(first, second, strict=True)) / n
    assert equal > (1 - distance) / (1 + distance) - 0.03
    assert first != second


def test_draws_are_independent_along_a_sequence() -> None:
    logits = torch.zeros(1, 4)
    params, tokens, sampler = SamplingParams(), [], Sampler()
    for position in range(4000):
        row = Row(params, prompt=[0] * position, seed=5)
        tokens.append(sample(logits, [row], sampler)[0].token_id)
    pairs = np.zeros((4, 4))
    for a, b in itertools.pairwise(tokens):
        pairs[a, b] += 1
    assert stats.chi2_contingency(pairs).pvalue > 1e-4


def test_a_bias_changes_its_own_row_only() -> None:
    logits = random_logits(3, 20)
    best = logits.argmax(-1).tolist()
    greedy = SamplingParams(temperature=0)
    banned = SamplingParams(temperature=0, logit_bias={best[1]: -100.0})
    tokens = [s.token_id for s in sample(logits, [Row(greedy), Row(banned), Row(greedy)])]
    assert tokens == [best[0], logits[1].topk(2).indices[1], best[2]]


def test_end_tokens_are_not_sampled_before_min_tokens() -> None:
    logits = torch.zeros(1, 300)
    logits[0, 7], logits[0, 8], logits[0, 9] = 9.0, 8.0, 7.0
    row = Row(SamplingParams(temperature=0, max_tokens=8, min_tokens=3), end_ids=[7, 8])
    for _ in range(6):
        token = sample(logits, [row])[0].token_id
        assert token is not None
        row.push(token)
    assert row.output == [9, 9, 9, 7, 7, 7]


@pytest.mark.parametrize("vocab_size", [30, 2560])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0},
        {"min_p": 0.3},
        {"top_p": 0.5},
        {"top_k": 3, "top_p": 0.5, "min_p": 0.1, "logprobs": 1},
        {"repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_logits_that_are_not_finite_fail_their_own_row_only(
    vocab_size: int, poison: float, values: dict[str, Any]
) -> None:
    rows = [Row(SamplingParams(**values))] * 3
    logits = random_logits(3, vocab_size)
    clean = sample(logits, rows)
    logits[1, 4] = poison
    got = sample(logits, rows)
    assert (got[0], got[2]) == (clean[0], clean[2])
    assert (got[1].token_id, got[1].logprob) == (None, None)
    assert "not finite" in (got[1].error or "")
