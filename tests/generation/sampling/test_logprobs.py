from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.generation.sampling.logprobs import token_logprobs
from llama_ray.generation.sampling.params import SamplingParams
from tests.generation.helpers import Row, random_logits, sample


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
    for i, p in enumerate(params):
        report = got[i].logprob
        if p.logprobs is None:
            assert report is None
            continue
        assert report is not None
        assert report.token_id == got[i].token_id
        assert report.logprob == pytest.approx(expected[i, report.token_id].item(), abs=1e-5)
        best = sorted(range(vocab_size), key=lambda t: (-expected[i, t].item(), t))[: p.logprobs]
        assert [t for t, _ in report.top] == best
        assert [v for _, v in report.top] == pytest.approx(expected[i, best].tolist(), abs=1e-5)


def test_logprobs_of_a_prompt_are_those_of_its_next_tokens() -> None:
    logits, prompt = random_logits(7, 90), [3, 5, 80, 5, 1, 0, 89, 12]
    expected = logits.log_softmax(-1)
    reports = token_logprobs(logits, prompt[1:], [2] * 7)
    assert [r.token_id for r in reports] == prompt[1:]
    for i, report in enumerate(reports):
        assert report.logprob == pytest.approx(expected[i, prompt[i + 1]].item(), abs=1e-5)
        assert [t for t, _ in report.top] == expected[i].topk(2).indices.tolist()


def test_no_tokens_have_no_logprobs() -> None:
    assert token_logprobs(random_logits(0, 90), [], []) == []
