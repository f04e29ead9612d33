from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from llama_ray.generation.sampling.noise import exponentials, noise_keys, stream_keys
from tests.generation.sampling import reference

# (seed, candidate, position) of each row.
ROWS = st.lists(
    st.tuples(st.integers(-(2**63), 2**64 - 1), st.integers(0, 127), st.integers(0, 2**20)),
    min_size=1,
    max_size=20,
)
TOKENS = torch.tensor([0, 1, 5, 31_999, 200_000])


def noise(
    seeds: Sequence[int], candidates: Sequence[int], positions: Sequence[int], tokens: Tensor
) -> Tensor:
    return exponentials(noise_keys(stream_keys(seeds, candidates), positions), tokens)


@given(ROWS)
def test_numbers_are_those_of_chained_splitmix64(rows: list[tuple[int, int, int]]) -> None:
    got = noise(*zip(*rows, strict=True), TOKENS)
    assert (got > 0).all()
    for numbers, row in zip(got.tolist(), rows, strict=True):
        expected = [reference.exponential(*row, token) for token in TOKENS.tolist()]
        assert numbers == pytest.approx(expected, rel=1e-12)


@given(ROWS)
def test_a_row_gets_the_same_numbers_alone_and_in_any_batch(rows: list[tuple[int, int, int]]) -> None:
    together = noise(*zip(*rows, strict=True), TOKENS)
    for numbers, (seed, candidate, position) in zip(together, rows, strict=True):
        assert noise([seed], [candidate], [position], TOKENS)[0].equal(numbers)
    # Keys of few rows are computed by other code than those of many.
    many = noise(*zip(*rows * 10, strict=True), TOKENS)
    assert many.equal(together.repeat(10, 1))


def test_numbers_are_exponential_and_independent_along_every_coordinate() -> None:
    n = 20_000
    zero, count, first = [0] * n, range(n), torch.tensor([0])
    streams = [
        noise(count, zero, zero, first)[:, 0],
        noise(zero, count, zero, first)[:, 0],
        noise(zero, zero, count, first)[:, 0],
        noise([0], [0], [0], torch.arange(n))[0],
    ]
    uniform = np.stack([(-stream).expm1().neg().numpy() for stream in streams])
    for stream in uniform:
        assert stats.kstest(stream, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(stream[:-1], stream[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(uniform)[np.triu_indices(4, 1)]).max() < 0.03
