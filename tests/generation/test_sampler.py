from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_ray.generation.sampler import adjust, filter_logits, sample
from llama_ray.generation.sampling import SamplingParams


@dataclass
class Row:
    params: SamplingParams
    prompt: list[int] = field(default_factory=lambda: [0])
    output: list[int] = field(default_factory=list)
    seed: int = 0
    index: int = 0


def peer_filter(logits: Tensor, p: SamplingParams) -> Tensor:
    """The same filters as transformers applies them, on one row [vocab]."""
    scores = TemperatureLogitsWarper(p.temperature)(None, logits[None].float())
    if p.top_k:
        scores = TopKLogitsWarper(p.top_k)(None, scores)
    if p.top_p < 1:
        scores = TopPLogitsWarper(p.top_p)(None, scores)
    if p.min_p:
        scores = MinPLogitsWarper(p.min_p)(None, scores)
    return scores[0]


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


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


@pytest.mark.parametrize("values", FILTERS, ids=str)
@pytest.mark.parametrize(("vocab_size", "scale"), [(50, 3.0), (3000, 3.0), (3000, 0.1)])
def test_filters_keep_what_transformers_keeps(values: dict[str, Any], vocab_size: int, scale: float) -> None:
    # The flat logits of scale 0.1 put the nucleus beyond the width that is looked at first.
    params = SamplingParams(**values)
    logits = random_logits(4, vocab_size, scale=scale)
    ours = filter_logits(logits, [params] * 4).softmax(-1)
    for row, got in zip(logits, ours, strict=True):
        expected = peer_filter(row, params).softmax(-1)
        assert (got > 0).equal(expected > 0)
        torch.testing.assert_close(got, expected)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 300),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**63),
)


@given(st.lists(PARAMS, min_size=1, max_size=6), st.integers(0, 1000), st.integers(1, 300), st.booleans())
@settings(max_examples=150, deadline=None)
def test_properties_of_filters(params: list[SamplingParams], seed: int, vocab_size: int, ties: bool) -> None:
    logits = random_logits(len(params), vocab_size, seed=seed)
    if ties:
        logits = logits.round()
    kept = filter_logits(logits, params) > -math.inf
    for row, p, keeps in zip(logits, params, kept, strict=True):
        least = row[keeps].min()  # raises where nothing was kept
        assert keeps.equal(row >= least), "what is at least as likely as something kept is kept"
        # The smallest set: without those that are as likely as the last, it would be too small.
        probabilities = (row.double() / p.temperature).softmax(-1)
        above = row > least
        allowed = p.top_k or vocab_size
        top = probabilities.sort(descending=True).values[:allowed]
        assert int(above.sum()) < allowed
        assert float(probabilities[above].sum()) < p.top_p * float(top.sum()) + 1e-5
        assert float(probabilities[keeps].min()) >= p.min_p * float(probabilities.max()) - 1e-6
    # A row's outcome does not depend on who stands beside it.
    rows = [Row(p, prompt=[0] * (i + 1), seed=p.seed or 0) for i, p in enumerate(params)]
    together = [s.token_id for s in sample(logits, rows)]
    assert together == [sample(logits[i : i + 1], [row])[0].token_id for i, row in enumerate(rows)]
    assert all(keeps[token] for keeps, token in zip(kept, together, strict=True))


@pytest.mark.parametrize("values", FILTERS, ids=str)
def test_samples_follow_the_exact_distribution(values: dict[str, Any]) -> None:
    n = 20_000
    logits = random_logits(60, seed=3, scale=1.5)
    rows = [Row(SamplingParams(**values), seed=seed) for seed in range(n)]
    tokens = [s.token_id for s in sample(logits.expand(n, -1), rows)]
    counts = np.bincount(tokens, minlength=60)
    expected = peer_filter(logits, SamplingParams(**values)).double().softmax(-1).numpy() * n
    assert counts[expected == 0].sum() == 0
    # Cells that expect fewer than 5 are taken together, as the test's approximation needs.
    small = expected < 5
    observed = np.append(counts[~small], counts[small].sum())
    wanted = np.append(expected[~small], expected[small].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    if len(observed) > 1:
        assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


def test_draws_are_independent_along_a_sequence() -> None:
    logits = torch.zeros(1, 4)
    params, tokens = SamplingParams(), []
    for position in range(4000):
        tokens.append(sample(logits, [Row(params, prompt=[0] * position, seed=5)])[0].token_id)
    pairs = np.zeros((4, 4))
    for a, b in itertools.pairwise(tokens):
        pairs[a, b] += 1
    assert stats.chi2_contingency(pairs).pvalue > 1e-4


def test_greedy_takes_the_largest_in_a_mixed_batch() -> None:
    logits = random_logits(6, 100, seed=1)
    params = [SamplingParams(temperature=t) for t in (0, 1.0, 0, 0.5, 0, 1e-30)]
    tokens = [s.token_id for s in sample(logits, [Row(p, seed=9) for p in params])]
    greedy = [0, 2, 4, 5]  # a temperature of almost 0 is greedy in effect
    assert [tokens[i] for i in greedy] == logits.argmax(-1)[greedy].tolist()


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits, prompt, output = random_logits(1, 50), [1, 2, 2, 7], [3, 7, 9]
    row = Row(SamplingParams(repetition_penalty=1.3), prompt, output)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[*prompt, *output]]), logits.clone())
    adjust(logits[0], row)
    torch.testing.assert_close(logits, expected)


def test_presence_and_frequency_count_the_output_and_bias_adds() -> None:
    logits = torch.zeros(8)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={6: 3.0, 2: -1.0})
    adjust(logits, Row(params, prompt=[0, 1], output=[2, 3, 3, 3]))
    assert logits.tolist() == [0, 0, -0.75 - 1.0, -1.25, 0, 0, 3.0, 0]


def test_penalties_touch_neither_other_rows_nor_the_given_logits() -> None:
    logits = random_logits(3, 20)
    before = logits.clone()
    best = logits.argmax(-1).tolist()
    greedy = SamplingParams(temperature=0)
    banned = SamplingParams(temperature=0, logit_bias={best[1]: -100.0})
    tokens = [s.token_id for s in sample(logits, [Row(greedy), Row(banned), Row(greedy)])]
    assert logits.equal(before)
    assert tokens == [best[0], logits[1].topk(2).indices[1], best[2]]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(3, 40)
    params = [
        SamplingParams(temperature=0.3, top_k=2, logit_bias={1: 5.0}, logprobs=4),
        SamplingParams(),
        SamplingParams(logprobs=0),
    ]
    got = sample(logits, [Row(p) for p in params])
    expected = logits.log_softmax(-1)
    assert got[1].logprob is None
    for i, count in ((0, 4), (2, 0)):
        report = got[i].logprob
        assert report is not None
        assert report.token_id == got[i].token_id
        assert report.logprob == pytest.approx(expected[i, report.token_id].item(), abs=1e-6)
        top = expected[i].topk(count)
        assert [t for t, _ in report.top] == top.indices.tolist()
        assert [v for _, v in report.top] == pytest.approx(top.values.tolist(), abs=1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize(
    "values", [{}, {"temperature": 0}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1, "logprobs": 1}]
)
def test_numbers_that_overflowed_fail_their_row_alone(poison: float, values: dict[str, Any]) -> None:
    logits = random_logits(3, 30)
    clean = [s.token_id for s in sample(logits, [Row(SamplingParams(**values))] * 3)]
    logits[1, 4] = poison
    got = [s.token_id for s in sample(logits, [Row(SamplingParams(**values))] * 3)]
    assert got == [clean[0], None, clean[2]]
