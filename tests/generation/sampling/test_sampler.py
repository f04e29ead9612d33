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
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llama_ray.generation.sampling.constraints import Grammars
from llama_ray.generation.sampling.draw import UNITS
from llama_ray.generation.sampling.logprobs import token_logprobs
from llama_ray.generation.sampling.noise import exponentials, noise_keys, stream_keys
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.sampling.row import DraftRow
from llama_ray.generation.sampling.sampler import Sampler
from tests.generation.helpers import Row, logits_after, random_logits, sample


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


def by_definition(logits: Tensor, row: Row) -> int:
    """One row's token, from the definitions, one token after the other and in whole numbers."""
    p, vocab_size = row.params, len(logits)
    if p.temperature == 0:
        return int(logits.argmax())
    shifted = (logits - logits.max()) / max(p.temperature, torch.finfo(torch.float32).tiny)
    mass = [int(m) for m in (shifted.exp() * UNITS).round().tolist()]
    order = list(range(vocab_size))
    if 0 < p.top_k < vocab_size or p.top_p < 1:
        order.sort(key=lambda token: (-logits[token].item(), token))
    if p.top_k:
        order = order[: p.top_k]
    total, before, kept = sum(mass[token] for token in order), 0, []
    for token in order:
        if p.top_p == 1 or before < p.top_p * total:
            kept.append(token)
        before += mass[token]
    least = torch.tensor(math.log(p.min_p) if p.min_p else -math.inf)
    kept = [token for token in kept if shifted[token] >= least]
    position = len(row.prompt) + len(row.output) + len(row.draft)
    key = noise_keys(stream_keys([row.seed], [row.index]), [position])
    times = exponentials(key, torch.arange(vocab_size))[0].tolist()
    return min((token for token in kept if mass[token]), key=lambda token: times[token] / mass[token])


PARAMS = st.builds(
    SamplingParams,
    temperature=st.just(0.0) | st.floats(1e-3, 5),
    top_k=st.just(0) | st.integers(0, 300),
    top_p=st.just(1.0) | st.floats(0.01, 1),
    min_p=st.just(0.0) | st.floats(0, 1),
    seed=st.integers(0, 2**63),
)


@given(
    st.lists(PARAMS, min_size=1, max_size=6),
    st.integers(0, 1000),
    st.integers(1, 300),
    st.sampled_from([0.02, 1.0, 3.0]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_every_row_draws_what_its_definition_says(
    params: list[SamplingParams], seed: int, vocab_size: int, scale: float, ties: bool
) -> None:
    logits = random_logits(len(params), vocab_size, seed=seed, scale=scale)
    if ties:
        logits = logits.round()
    rows = [Row(p, prompt=[0] * (i + 1), seed=p.seed or 0, index=i % 3) for i, p in enumerate(params)]
    got = [s.token_id for s in sample(logits, rows)]
    assert got == [by_definition(of, row) for of, row in zip(logits, rows, strict=True)]


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_a_nucleus_of_any_size_is_found(scale: float) -> None:
    params = [
        SamplingParams(top_p=p, top_k=k, min_p=m)
        for p, k, m in (
            (0.5, 0, 0),
            (0.9, 0, 0),
            (0.999, 0, 0),
            (0.99, 1000, 0),
            (0.9, 1500, 0),
            (0.97, 0, 1e-3),
        )
    ]
    logits = random_logits(60, 3000, scale=scale)
    rows = [Row(params[i % len(params)], seed=i) for i in range(60)]
    got = [s.token_id for s in sample(logits, rows)]
    assert got == [by_definition(of, row) for of, row in zip(logits, rows, strict=True)]


MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9),
    SamplingParams(top_k=500, min_p=0.02, logprobs=3),
    SamplingParams(top_p=0.95),
    SamplingParams(temperature=1.5, min_p=0.1),
    SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3, logprobs=1),
    SamplingParams(top_k=20, presence_penalty=1.0, logit_bias={7: 2.0, 9: -5.0}),
    SamplingParams(temperature=0, min_tokens=3, max_tokens=20, logit_bias={5: 30.0}),
]


def test_company_changes_nothing() -> None:
    """Thousands of tokens in random company, by one sampler: each, with its log-probabilities, as it is alone."""
    rng = np.random.default_rng(0)
    rows = [
        Row(
            MIXED[i % len(MIXED)],
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


def test_a_plan_is_kept_for_the_same_rows_only() -> None:
    logits, sampler = random_logits(2, 50), Sampler()
    rows = [Row(SamplingParams(), seed=1), Row(SamplingParams(temperature=0), seed=2)]
    for step in range(3):
        assert sample(logits, rows, sampler) == sample(logits, rows)
        for row in rows:
            row.push(step)
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


@pytest.mark.parametrize("values", [{}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9}], ids=str)
def test_models_that_think_alike_draw_alike(values: dict[str, Any]) -> None:
    """As often as the Gumbel-max trick has them: (1 - d) / (1 + d) at least, d the distributions' total variation."""
    n, params = 4000, SamplingParams(**values)
    logits = random_logits(500, scale=2.0)
    pair = [logits, logits + random_logits(500, seed=1, scale=0.3)]
    rows = [Row(params, seed=seed) for seed in range(n)]
    first, second = ([s.token_id for s in sample(x.expand(n, -1), rows)] for x in pair)
    p, q = (peer_filter(x, params).double().softmax(-1) for x in pair)
    apart = ((p - q).abs().sum() / 2).item()
    alike = sum(a == b for a, b in zip(first, second, strict=True)) / n
    assert alike > (1 - apart) / (1 + apart) - 0.03
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


@pytest.mark.parametrize("vocab_size", [100, 256, 4096])
def test_greedy_takes_the_first_of_the_largest_in_a_mixed_batch(vocab_size: int) -> None:
    logits = random_logits(6, vocab_size, seed=1)
    logits[2, [vocab_size - 9, 3, 77]] = 50.0
    params = [SamplingParams(temperature=t) for t in (0, 1.0, 0, 0.5, 0, 1e-30)]
    tokens = [s.token_id for s in sample(logits, [Row(p, seed=9) for p in params])]
    greedy = [0, 2, 4, 5]  # a temperature of almost 0 is greedy in effect
    assert tokens[2] == 3
    assert [tokens[i] for i in greedy] == logits.argmax(-1)[greedy].tolist()


def test_penalties_and_bias_touch_no_other_row() -> None:
    logits = random_logits(3, 20)
    best = logits.argmax(-1).tolist()
    greedy = SamplingParams(temperature=0)
    banned = SamplingParams(temperature=0, logit_bias={best[1]: -100.0})
    tokens = [s.token_id for s in sample(logits, [Row(greedy), Row(banned), Row(greedy)])]
    assert tokens == [best[0], logits[1].topk(2).indices[1], best[2]]


def test_no_end_before_min_tokens() -> None:
    logits = torch.zeros(1, 300)
    logits[0, 7], logits[0, 8], logits[0, 9] = 9.0, 8.0, 7.0
    params = SamplingParams(temperature=0, max_tokens=8, min_tokens=3)
    row = Row(params, end_ids=[7, 8])
    for _ in range(6):
        token = sample(logits, [row])[0].token_id
        assert token is not None
        row.push(token)
    assert row.output == [9, 9, 9, 7, 7, 7]
    ahead = [DraftRow(Row(params, end_ids=[7, 8]), (9,) * n) for n in range(5)]
    assert [s.token_id for s in Sampler().sample(logits.repeat(5, 1), ahead)] == [9, 9, 9, 7, 7]


def test_rows_ahead_draw_what_their_row_will_draw(tokenizer: Any) -> None:
    """Guesses in one batch with their sequences: where they are right, token and report are those of single steps."""
    vocab_size, eos = 320, {1}
    grammars = Grammars(tokenizer, vocab_size, eos)
    every = [
        *MIXED,
        SamplingParams(regex="[ab ]{9}c*"),
        SamplingParams(top_k=30, regex="(the|fox| )+", min_tokens=4),
    ]
    sampler = Sampler()
    for p in every:
        row = Row(p, seed=11, end_ids=eos, constraint=grammars.constraint(p))
        there = Row(p, seed=11, end_ids=eos, constraint=grammars.constraint(p))
        expected = []
        for _ in range(6):
            expected.append(sample(logits_after(row, vocab_size)[None], [row])[0])
            token = expected[-1].token_id
            assert token is not None
            row.push(token)
            if token in eos:
                break
        wrong = [(token + 1) % vocab_size for token in row.output]
        for n in range(len(expected)):
            guess = row.output[n:-1]
            ahead = [there, *(DraftRow(there, guess[: k + 1]) for k in range(len(guess)))]
            # A guess that goes wrong beside them, from any place on, must not matter to them.
            ahead += [DraftRow(there, [*guess[:k], *wrong[k : k + 1]]) for k in range(len(guess))]
            logits = torch.stack([logits_after(a, vocab_size) for a in ahead])
            assert sampler.sample(logits, ahead)[: len(guess) + 1] == expected[n:]
            there.push(row.output[n])


@given(st.integers(0, 100), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([40, 5000]))
@settings(max_examples=30, deadline=None)
def test_logprobs_are_of_the_raw_logits(seed: int, dtype: torch.dtype, vocab_size: int) -> None:
    logits = random_logits(4, vocab_size, seed=seed).to(dtype)
    params = [
        SamplingParams(temperature=0.3, top_k=2, logit_bias={1: 5.0}, logprobs=4),
        SamplingParams(),
        SamplingParams(logprobs=0),
        SamplingParams(repetition_penalty=1.5, logprobs=20),
    ]
    got = sample(logits, [Row(p) for p in params])
    expected = logits.double().log_softmax(-1)
    assert got[1].logprob is None
    for i, count in ((0, 4), (2, 0), (3, 20)):
        report = got[i].logprob
        assert report is not None
        assert report.token_id == got[i].token_id
        assert report.logprob == pytest.approx(expected[i, report.token_id].item(), abs=1e-5)
        best = sorted(range(vocab_size), key=lambda t: (-expected[i, t].item(), t))[:count]
        assert [t for t, _ in report.top] == best
        assert [v for _, v in report.top] == pytest.approx(expected[i, best].tolist(), abs=1e-5)


def test_logprobs_of_a_prompt() -> None:
    logits, prompt = random_logits(7, 90), [3, 5, 80, 5, 1, 0, 89, 12]
    expected = logits.log_softmax(-1)
    reports = token_logprobs(logits, prompt[1:], [2] * 7)
    assert [r.token_id for r in reports] == prompt[1:]
    for i, report in enumerate(reports):
        assert report.logprob == pytest.approx(expected[i, prompt[i + 1]].item(), abs=1e-5)
        assert [t for t, _ in report.top] == expected[i].topk(2).indices.tolist()
    assert token_logprobs(logits[:0], [], []) == []


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
)
def test_numbers_that_overflowed_fail_their_row_alone(poison: float, values: dict[str, Any]) -> None:
    for vocab_size in (30, 2560):
        logits = random_logits(3, vocab_size)
        clean = sample(logits, [Row(SamplingParams(**values))] * 3)
        logits[1, 4] = poison
        got = sample(logits, [Row(SamplingParams(**values))] * 3)
        assert (got[0], got[2]) == (clean[0], clean[2])
        assert (got[1].token_id, got[1].logprob) == (None, None)
        assert "not finite" in (got[1].error or "")
