from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from llama_ray.generation.noise import starts, uniforms, uniforms_from

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


def test_positions_run_through_one_splitmix64() -> None:
    start = splitmix64(7, 1)[0]  # seed 7; candidate 0 hashes it once more
    start = splitmix64(start - 0x9E3779B97F4A7C15, 1)[0]
    expected = [(bits >> 40) / 2**24 for bits in splitmix64(start, 50)]
    assert uniforms([7] * 50, [0] * 50, range(1, 51)).tolist() == expected


@given(ROWS)
def test_each_row_draws_what_it_draws_alone(rows: list[tuple[int, int, int]]) -> None:
    together = uniforms(*zip(*rows, strict=True))
    assert together.dtype == np.float32
    assert ((together >= 0) & (together < 1)).all()
    assert together.tolist() == [uniforms([s], [c], [p])[0] for s, c, p in rows]
    seeds, candidates, positions = zip(*rows, strict=True)
    assert together.tolist() == uniforms_from(starts(seeds, candidates), positions).tolist()


def test_uniform_and_independent_along_every_coordinate() -> None:
    n = 20_000
    zero, count = [0] * n, range(n)
    streams = [uniforms(count, zero, zero), uniforms(zero, count, zero), uniforms(zero, zero, count)]
    for numbers in streams:
        assert stats.kstest(numbers, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(streams)[np.triu_indices(3, 1)]).max() < 0.03
