"""Draft rows: the tokens that a sequence would draw further ahead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.constraints.grammars import Grammars
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.sampling.row import DraftRow
from llama_ray.generation.sampling.sampler import Sample, Sampler
from tests.generation.helpers import Row, logits_after, sample
from tests.generation.sampling import reference

VOCAB_SIZE, EOS = 320, 1
CONSTRAINED = [
    SamplingParams(regex="[ab ]{9}c*"),
    SamplingParams(top_k=30, regex="(the|fox| )+", min_tokens=4),
]


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    grammars = Grammars(tokenizer, VOCAB_SIZE, {EOS})
    yield grammars
    grammars.close()


def new_row(params: SamplingParams, grammars: Grammars) -> Row:
    constraint = grammars.constraints(*params.grammar, 1)[0] if params.grammar else None
    return Row(params, seed=11, end_ids={EOS}, constraint=constraint)


def generate(row: Row, count: int) -> list[Sample]:
    """Sample `count` tokens one after the other, or up to the end of the text."""
    samples = []
    for _ in range(count):
        samples.append(sample(logits_after(row, VOCAB_SIZE)[None], [row])[0])
        token = samples[-1].token_id
        assert token is not None
        row.push(token)
        if token == EOS:
            break
    return samples


@pytest.mark.parametrize("params", [*reference.MIXED, *CONSTRAINED])
def test_a_draft_row_draws_what_its_row_draws_at_that_position(
    params: SamplingParams, grammars: Grammars
) -> None:
    """Token and log-probabilities are those of single steps, with wrong draft tokens beside the right ones."""
    finished, row = new_row(params, grammars), new_row(params, grammars)
    expected = generate(finished, 6)
    wrong = [(token + 1) % VOCAB_SIZE for token in finished.output]
    sampler = Sampler()
    for n in range(len(expected)):
        draft = finished.output[n:-1]
        right = [DraftRow(row, draft[: k + 1]) for k in range(len(draft))]
        astray = [DraftRow(row, [*draft[:k], *wrong[k : k + 1]]) for k in range(len(draft))]
        batch = [row, *right, *astray]
        logits = torch.stack([logits_after(r, VOCAB_SIZE) for r in batch])
        assert sample(logits, batch, sampler)[: 1 + len(right)] == expected[n:]
        row.push(finished.output[n])


def test_a_draft_counts_towards_min_tokens() -> None:
    logits = torch.zeros(1, 300)
    logits[0, 7], logits[0, 8], logits[0, 9] = 9.0, 8.0, 7.0
    row = Row(SamplingParams(temperature=0, max_tokens=8, min_tokens=3), end_ids=[7, 8])
    ahead = [DraftRow(row, (9,) * n) for n in range(5)]
    assert [s.token_id for s in Sampler().sample(logits.repeat(5, 1), ahead)] == [9, 9, 9, 7, 7]
