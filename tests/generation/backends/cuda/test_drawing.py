from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (the CPU build of torch comes without)")

from llama_ray.generation.backends.cuda.drawing import TRITON_OPS
from llama_ray.generation.sampling.candidates import top_candidates_by_keys
from llama_ray.generation.sampling.draw import SamplingTensors, draw_filtered
from llama_ray.generation.sampling.noise import noise_keys, stream_keys
from llama_ray.generation.sampling.params import SamplingParams
from tests.generation.helpers import random_logits

PARAMS = [
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.95, temperature=0.7, min_p=0.01),
    SamplingParams(top_k=40, top_p=0.9),
    SamplingParams(top_k=1000, top_p=0.5),
    SamplingParams(top_k=50, temperature=2.5, min_p=0.01),
    SamplingParams(top_k=1),
    SamplingParams(top_k=64, temperature=1e-37),
    SamplingParams(top_k=64, temperature=1e30),
    SamplingParams(top_k=64, min_p=1.0),
    SamplingParams(top_p=1e-9, temperature=3.0),
]


def draws(
    logits: Tensor, width: int, params: list[SamplingParams], device: torch.device
) -> tuple[Tensor, SamplingTensors, Tensor]:
    """Return the arguments of `draw_filtered` for rows with `params` in turn."""
    rows = len(logits)
    some = [params[i % len(params)] for i in range(rows)]
    keys = noise_keys(stream_keys(range(rows), [0] * rows), range(rows)).to(device)
    return logits.to(device), SamplingTensors.of(some, width, logits.shape[-1], device), keys


def assert_equal_to_torch(arguments: tuple[Tensor, SamplingTensors, Tensor]) -> None:
    expected, expected_short = draw_filtered(*arguments)
    got, short = TRITON_OPS.draw_filtered(*arguments)
    if expected_short is None:
        assert short is None
        assert got.tolist() == expected.tolist()
    else:
        assert short is not None
        assert short.tolist() == expected_short.tolist()
        assert got[~short].tolist() == expected[~short].tolist()


@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize(("vocab_size", "width"), [(3, 3), (50, 50), (2003, 64), (1503, 1024), (1100, 1100)])
def test_every_row_draws_the_token_of_torch(
    vocab_size: int, width: int, scale: float, device: torch.device
) -> None:
    logits = random_logits(10, vocab_size, scale=scale)
    # Equal logits, 0 and -0 among them.
    logits[::3] = logits[::3].round()
    logits[::7, 1::2] = -math.inf
    params = [p for p in PARAMS if p.top_k or width >= min(vocab_size, 1024)]
    assert_equal_to_torch(draws(logits, width, params, device))


def test_a_nucleus_of_more_than_its_candidates_is_short(device: torch.device) -> None:
    logits = random_logits(2, 1503, scale=0.01)
    logits[1:] *= 500
    arguments = draws(logits, 1024, [SamplingParams(top_p=0.9)], device)
    _, short = TRITON_OPS.draw_filtered(*arguments)
    assert short is not None
    assert short.tolist() == [True, False]
    assert_equal_to_torch(arguments)


def test_a_row_draws_the_same_token_alone_and_in_company(device: torch.device) -> None:
    logits, tensors, keys = draws(random_logits(3, 1200), 1024, [SamplingParams(top_p=0.9)], device)
    together, _ = TRITON_OPS.draw_filtered(logits, tensors, keys)
    alone = SamplingTensors.of([SamplingParams(top_p=0.9)], 1024, 1200, device)
    got = [TRITON_OPS.draw_filtered(logits[i : i + 1], alone, keys[i : i + 1])[0].item() for i in range(3)]
    assert together.tolist() == got


# Triton's interpreter warns of inf - inf.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gets_any_token_and_changes_no_other(
    poison: float, device: torch.device
) -> None:
    logits, tensors, keys = draws(random_logits(3, 1100), 1024, [SamplingParams(top_p=0.9)], device)
    clean, _ = TRITON_OPS.draw_filtered(logits, tensors, keys)
    logits[1] = poison
    tokens, _ = TRITON_OPS.draw_filtered(logits, tensors, keys)
    assert tokens[[0, 2]].tolist() == clean[[0, 2]].tolist()
    assert 0 <= tokens[1] < 1100


@pytest.mark.parametrize(("vocab_size", "width"), [(5, 5), (300, 64), (2003, 64), (1503, 1024), (11000, 20)])
def test_candidates_are_those_of_torch(vocab_size: int, width: int, device: torch.device) -> None:
    logits = random_logits(5, vocab_size).to(device)
    # Equal logits, 0 and -0 among them.
    logits[1:] = logits[1:].round()
    logits[3, ::2] = -math.inf
    for got, expected in zip(
        TRITON_OPS.top_candidates(logits, width), top_candidates_by_keys(logits, width), strict=True
    ):
        assert got.dtype == expected.dtype
        assert got.tolist() == expected.tolist()
