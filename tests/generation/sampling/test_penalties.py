from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.sampling.penalties import Penalties, TokenCounts
from tests.generation.helpers import Row, random_logits

TOKENS = st.lists(st.integers(0, 30), max_size=60)


def penalised(logits: Tensor, rows: dict[int, Row]) -> Tensor:
    """Return the logits after the penalties of `rows`, which are given by their numbers in the batch."""
    logits = logits.clone()
    seen = [row.counts.after(row.draft) for row in rows.values() if row.counts is not None]
    Penalties([*rows], [row.params for row in rows.values()], logits.device).apply(logits, seen)
    return logits


@given(TOKENS, TOKENS, TOKENS)
def test_counts_are_those_of_the_output_and_the_draft(
    prompt: list[int], output: list[int], draft: list[int]
) -> None:
    counts = TokenCounts(prompt)
    for token in output:
        counts.push(token)
    # Without a draft last: counting a draft must not change the counts themselves.
    for ahead in (draft, []):
        ids, times = counts.after(ahead)
        expected = {token: Counter([*output, *ahead])[token] for token in [*prompt, *output, *ahead]}
        assert len(ids) == len(expected)
        assert dict(zip(ids.tolist(), times.tolist(), strict=True)) == expected


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = random_logits(3, 50)
    rows = {
        0: Row(SamplingParams(repetition_penalty=1.3), [1, 2, 2, 7], [3, 7, 9]),
        2: Row(SamplingParams(repetition_penalty=0.8), [4], [4, 30], draft=(31, 4)),
    }
    got = penalised(logits, rows)
    assert got[1].equal(logits[1])
    for i, row in rows.items():
        tokens = torch.tensor([[*row.prompt, *row.output, *row.draft]])
        processor = RepetitionPenaltyLogitsProcessor(row.params.repetition_penalty)
        torch.testing.assert_close(got[i], processor(tokens, logits[i : i + 1].clone())[0])


def test_presence_and_frequency_penalties_ignore_the_prompt() -> None:
    row = Row(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), [0, 1], [2, 3, 3, 3])
    assert penalised(torch.zeros(1, 6), {0: row})[0].tolist() == [0, 0, -0.75, -1.25, 0, 0]
    row = Row(SamplingParams(repetition_penalty=2.0, frequency_penalty=0.25), [0, 1], [1], draft=(4, 4))
    assert penalised(torch.ones(1, 6), {0: row})[0].tolist() == [0.5, 0.25, 1, 1, 0, 1]


def test_only_tokens_that_a_penalty_needs_are_counted() -> None:
    assert TokenCounts.of(SamplingParams(logit_bias={1: 2.0}), [1, 2]) is None
    counts = TokenCounts.of(SamplingParams(presence_penalty=1.0), [1, 2])
    assert counts is not None
    assert len(counts.after()[0]) == 0
