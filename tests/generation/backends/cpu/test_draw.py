from __future__ import annotations

import ctypes
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from llama_ray.generation.backends.cpu import ops
from llama_ray.generation.sampling.draw import SamplerOps, SamplingTensors
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.sampling.sampler import Sampler
from tests.generation.helpers import Row, random_logits

PARAMS = [
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.999, min_p=1e-4),
    SamplingParams(top_k=1000, top_p=0.5),
    SamplingParams(top_k=3000),
    SamplingParams(temperature=2.5, top_k=300, min_p=0.01),
    SamplingParams(temperature=1e-30, top_k=5),
    SamplingParams(top_k=64),
    SamplingParams(),
    SamplingParams(temperature=1.3, min_p=0.02),
    SamplingParams(temperature=0),
]


def rows(count: int) -> list[Row]:
    return [Row(PARAMS[i % len(PARAMS)], prompt=[1] * (1 + i % 7), seed=i) for i in range(count)]


def cpu_sampler() -> Sampler:
    return Sampler(SamplerOps(ops.top_candidates, ops.draw_filtered, ops.draw_from_all))


def tokens(logits: torch.Tensor, some: list[Row], sampler: Sampler) -> list[int | None]:
    return [s.token_id for s in sampler.sample(logits.clone(), some)]


@pytest.mark.parametrize("vocab_size", [3, 50, 1500, 5003])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_the_kernel_draws_the_same_tokens_as_torch(
    kernels: ctypes.CDLL, vocab_size: int, scale: float
) -> None:
    # tests/generation/sampling compares torch with the reference. Exponentials of the two may differ in the last bit,
    # which rarely decides a draw.
    some, logits = rows(600), random_logits(600, vocab_size, scale=scale)
    logits[::5] = logits[::5].round()
    got, expected = (np.array(tokens(logits, some, by)) for by in (cpu_sampler(), Sampler()))
    assert (got == expected).mean() >= 0.998


def test_a_row_gets_the_same_token_alone_and_in_any_batch(kernels: ctypes.CDLL) -> None:
    some, logits = rows(200), random_logits(200, 4000)
    alone = [tokens(logits[i : i + 1], [row], cpu_sampler())[0] for i, row in enumerate(some)]
    assert tokens(logits, some, cpu_sampler()) == alone
    order = np.random.default_rng(0).permutation(200).tolist()
    assert tokens(logits[order], [some[i] for i in order], cpu_sampler()) == [alone[i] for i in order]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_fail_their_own_row_only(kernels: ctypes.CDLL, poison: float) -> None:
    some, logits = rows(20), random_logits(20, 2000)
    clean = tokens(logits, some, cpu_sampler())
    logits[3] = poison
    assert tokens(logits, some, cpu_sampler()) == [*clean[:3], None, *clean[4:]]


# The ends of what SamplingParams takes, and logits up to the largest biases.
EXTREMES: dict[str, list[Any]] = {
    "temperature": [0.0, 2**-126, 1e-30, 0.5, 1.0, 1e30, 3.4e38],
    "top_k": [0, 1, 2, 64, 65, 2**31 - 1],
    "top_p": [2**-126, 1e-20, 0.5, 1 - 2**-53, 1.0],
    "min_p": [0.0, 2**-126, 0.5, 1 - 2**-53, 1.0],
    "repetition_penalty": [0.001, 1.0, 1000.0],
    "presence_penalty": [-2.0, 0.0, 2.0],
    "frequency_penalty": [-2.0, -0.0, 2.0],
    "logit_bias": [None, {0: 1e30}, {1: -1e30, 2: -100}, {0: -0.0, 1: 5, 2: 1e30}],
    "seed": [-(2**63), 0, 2**64 - 1],
}
EXTREME_LOGITS = [-math.inf, -1e30, -5.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 7.5, 1e30]


def test_at_the_extremes_the_kernel_and_torch_draw_the_same_allowed_token(kernels: ctypes.CDLL) -> None:
    torch.set_num_threads(1)
    rng = random.Random(0)
    for batch in range(200):
        params = [
            SamplingParams(**{name: rng.choice(values) for name, values in EXTREMES.items()})
            for _ in range(5)
        ]
        some = [Row(p, prompt=[1], output=[0, 2, 2], seed=p.seed or 0, index=i) for i, p in enumerate(params)]
        extremes = torch.tensor([1.0, *rng.choices(EXTREME_LOGITS, k=rng.randrange(2, 12))])
        logits = torch.cat([extremes, random_logits(rng.choice([0, 90, 1500]), seed=batch)]).expand(5, -1)
        got = tokens(logits, some, cpu_sampler())
        assert got == tokens(logits, some, Sampler()), (params, extremes)
        assert all(token is not None and logits[0, token] > -math.inf for token in got), (params, extremes)


def test_sampling_tensors_of_another_batch_size_are_refused(kernels: ctypes.CDLL) -> None:
    tensors = SamplingTensors.of([SamplingParams(top_k=40)] * 2, 64, 100, torch.device("cpu"))
    with pytest.raises(ValueError, match="3 rows, 2 noise keys and 2 rows of sampling tensors"):
        ops.draw_filtered(random_logits(3, 100), tensors, torch.zeros(2, 1, dtype=torch.int64))
