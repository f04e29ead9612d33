from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llama_ray.utils.integers import GOLDEN_GAMMA, ceil_div, splitmix64

UINT64 = st.integers(0, 2**64 - 1)


@given(a=st.integers(), b=st.integers(min_value=1))
def test_ceil_div_rounds_the_exact_quotient_up(a: int, b: int) -> None:
    assert ceil_div(a, b) == math.ceil(Fraction(a, b))


def test_splitmix64_gives_the_published_sequence() -> None:
    # The first outputs for the seed 1234567, as other implementations give them.
    states = [(1234567 + n * GOLDEN_GAMMA) % 2**64 for n in range(1, 6)]
    assert [splitmix64(state) for state in states] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(values=st.lists(UINT64, min_size=1))
def test_splitmix64_of_an_array_is_that_of_each_element(values: list[int]) -> None:
    array = splitmix64(np.array(values, dtype=np.uint64))
    assert array.dtype == np.uint64
    assert array.tolist() == [splitmix64(value) for value in values]


@given(a=UINT64, b=UINT64)
def test_splitmix64_is_injective(a: int, b: int) -> None:
    assert (splitmix64(a) == splitmix64(b)) == (a == b)


def test_each_input_bit_flips_half_of_the_output_bits() -> None:
    values = [n * GOLDEN_GAMMA % 2**64 for n in range(2000)]
    for bit in range(64):
        flipped = [(splitmix64(value) ^ splitmix64(value ^ 1 << bit)).bit_count() for value in values]
        # 32 of 64 bits, within eight standard errors of the mean, sqrt(16 / 2000).
        assert abs(sum(flipped) / len(flipped) - 32) < 0.72
