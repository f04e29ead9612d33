from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from llama_ray.generation.sampling.noise import exponentials, noise_keys, stream_keys

ROWS = st.lists(
    st.tuples(st.integers(-(2**63), 2**64 - 1), st.integers(0, 127), st.integers(0, 2**20)),
    min_size=1,
    max_size=20,
)


def splitmix64(state: int, count: int) -> list[int]:
    """The published algorithm, in plain integers."""
    mask, out = 2**64 - 1, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        out.append(z ^ z >> 31)
    return out


def numbers(start: int, count: int) -> list[int]:
    """The stream of tokens, or of positions, from its start on."""
    return splitmix64((start - 0x9E3779B97F4A7C15) % 2**64, count)


def draw(seeds: Sequence[int], candidates: Sequence[int], positions: Sequence[int], tokens: Tensor) -> Tensor:
    return exponentials(noise_keys(stream_keys(seeds, candidates), positions), tokens)


def test_numbers_are_those_of_splitmix64() -> None:
    [seed] = splitmix64(7, 1)
    candidate = numbers(seed, 3)[2]
    place = numbers(candidate, 100)[99]
    expected = [-math.log1p(-((bits >> 12) + 0.5) / 2**52) for bits in numbers(place, 50)]
    assert draw([7], [2], [99], torch.arange(50))[0].tolist() == pytest.approx(expected, rel=1e-12)


@given(ROWS)
def test_each_row_draws_what_it_draws_alone(rows: list[tuple[int, int, int]]) -> None:
    tokens = torch.tensor([0, 1, 5, 31_999, 200_000])
    together = draw(*zip(*rows, strict=True), tokens)
    assert (together > 0).all()
    assert together.isfinite().all()
    for row, (seed, candidate, position) in zip(together, rows, strict=True):
        assert draw([seed], [candidate], [position], tokens)[0].equal(row)
    # few places are made by other means than many
    many = draw(*zip(*rows * 10, strict=True), tokens)
    assert many.equal(together.repeat(10, 1))


def test_exponential_and_independent_along_every_coordinate() -> None:
    n = 20_000
    zero, count, first = [0] * n, range(n), torch.tensor([0])
    streams = [
        draw(count, zero, zero, first)[:, 0],
        draw(zero, count, zero, first)[:, 0],
        draw(zero, zero, count, first)[:, 0],
        draw([0], [0], [0], torch.arange(n))[0],
    ]
    uniform = np.stack([(-stream).expm1().neg().numpy() for stream in streams])
    for stream in uniform:
        assert stats.kstest(stream, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(stream[:-1], stream[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(uniform)[np.triu_indices(4, 1)]).max() < 0.03
