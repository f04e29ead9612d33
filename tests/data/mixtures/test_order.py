"""The order of a mixture, as a pure function: its properties over sizes, weights and phases."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.data.mixtures.order import BLOCK, Order, Phase, Source
from llama_ray.data.mixtures.weights import WHOLE, shares

NAMES = "abcde"
LENGTH = 2 * BLOCK


@st.composite
def orders(draw: st.DrawFn) -> tuple[list[Source], list[Phase]]:
    names = NAMES[: draw(st.integers(1, len(NAMES)))]
    sources = [Source(name, draw(st.sampled_from([3, 50, 170, 400]))) for name in names]
    starts = [0, *sorted(draw(st.lists(st.integers(0, LENGTH), max_size=3)))]
    weights = st.lists(st.sampled_from([0, 1, 2, 0.1, 1e-9, 1e9]), min_size=len(names), max_size=len(names))
    phases = [
        Phase(start, shares(dict(zip(names, draw(weights.filter(any)), strict=True)))) for start in starts
    ]
    return sources, phases


Case = tuple[list[Source], list[Phase]]


def pairs(order: Order, first: int, count: int) -> list[tuple[int, int]]:
    sources, windows = order.windows(first, count)
    return list(zip(sources.tolist(), windows.tolist(), strict=True))


@settings(deadline=None, max_examples=20)
@given(case=orders(), seed=st.integers(0, 2**40))
def test_each_epoch_of_each_source_holds_each_window_once(case: Case, seed: int) -> None:
    order = Order(*case, seed)
    sources, windows = order.windows(0, LENGTH)
    for number, source in enumerate(order.sources):
        mine = windows[sources == number]
        for start in range(0, len(mine), source.num_windows):
            epoch = mine[start : start + source.num_windows]
            assert len(set(epoch.tolist())) == len(epoch)
            assert epoch.min() >= 0
            assert epoch.max() < source.num_windows


@settings(deadline=None, max_examples=20)
@given(case=orders(), seed=st.integers(0, 2**40), cuts=st.lists(st.integers(0, LENGTH), max_size=6))
def test_any_part_of_the_order_can_be_computed_alone(case: Case, seed: int, cuts: list[int]) -> None:
    whole = pairs(Order(*case, seed), 0, LENGTH)
    borders = [0, *sorted(cuts), LENGTH]
    parts = list(itertools.pairwise(borders))
    for first, end in reversed(parts):
        assert pairs(Order(*case, seed), first, end - first) == whole[first:end]


@settings(deadline=None, max_examples=20)
@given(case=orders(), seed=st.integers(0, 2**40), position=st.integers(0, LENGTH))
def test_counts_are_those_of_the_order(case: Case, seed: int, position: int) -> None:
    order = Order(*case, seed)
    sources, _ = order.windows(0, position)
    assert order.counts(position) == np.bincount(sources, minlength=len(order.sources)).tolist()


@settings(deadline=None, max_examples=20)
@given(case=orders(), prefix=st.integers(0, LENGTH))
def test_each_prefix_of_a_phase_keeps_the_weights(case: Case, prefix: int) -> None:
    order = Order(case[0], case[1][:1], 0)
    for end, bound in ((prefix, BLOCK / 4 + len(case[0])), (prefix // BLOCK * BLOCK, len(case[0]))):
        counts = order.counts(end)
        assert sum(counts) == end
        for source, count in zip(order.sources, counts, strict=True):
            assert abs(count - end * case[1][0].shares.get(source.name, 0) / WHOLE) < bound


@settings(deadline=None, max_examples=20)
@given(case=orders(), seed=st.integers(0, 2**40), later=st.integers(0, LENGTH), windows=st.integers(1, 99))
def test_what_comes_later_changes_nothing_before(case: Case, seed: int, later: int, windows: int) -> None:
    """A phase that is added ahead, with a source that is new, whose name may stand before the others."""
    sources, phases = case
    phases = [phase for phase in phases if phase.start < later] or phases[:1]
    before = named(Order(sources, phases, seed), later)
    for name in ("A", "ab", "z"):
        more = [*phases, Phase(later, shares({name: 1, "a": 1}))]
        assert named(Order([*sources, Source(name, windows)], more, seed), later) == before


def named(order: Order, count: int) -> list[tuple[str, int]]:
    return [(order.sources[source].name, window) for source, window in pairs(order, 0, count)]


def test_the_order_of_sources_in_a_list_does_not_matter() -> None:
    sources = [Source(name, 50) for name in NAMES]
    phases = [Phase(0, shares(dict.fromkeys(NAMES, 1.0)))]
    assert named(Order(sources, phases, 3), 500) == named(Order(sources[::-1], phases, 3), 500)


def test_equal_shares_go_on_where_a_phase_would_end() -> None:
    sources, weights = [Source("a", 70), Source("b", 30)], shares({"a": 2, "b": 1})
    whole = Order(sources, [Phase(0, weights)], 0)
    divided = Order(sources, [Phase(0, weights), Phase(100, weights), Phase(1500, weights)], 0)
    assert pairs(divided, 0, LENGTH) == pairs(whole, 0, LENGTH)


def test_places_of_sources_are_mixed_and_depend_on_the_seed() -> None:
    sources, phases = [Source("a", 10**6), Source("b", 10**6)], [Phase(0, shares({"a": 1, "b": 1}))]
    orders = [Order(sources, phases, seed).windows(0, 10 * BLOCK)[0] for seed in (0, 1)]
    for order in orders:
        # Neighbours are alike half of the time.
        assert np.mean(order[1:] == order[:-1]) == pytest.approx(0.5, abs=0.03)
        # Each block is mixed in a way of its own.
        assert np.mean(order[BLOCK:] == order[:-BLOCK]) == pytest.approx(0.5, abs=0.03)
    assert np.mean(orders[0] == orders[1]) == pytest.approx(0.5, abs=0.03)


def test_an_order_of_trillions_starts_at_once_anywhere() -> None:
    sources = [Source(str(n), 10**12 + n) for n in range(100)]
    weights = shares({str(n): n + 1.0 for n in range(100)})
    started = time.perf_counter()
    order = Order(
        sources, [Phase(0, weights), Phase(10**15, weights | {}), Phase(2**60, shares({"7": 1}))], 0
    )
    found = pairs(order, 10**15 - 500, 1000)
    assert time.perf_counter() - started < 1
    assert len(set(found)) == 1000
    assert sum(order.counts(2**61)) == 2**61


@settings(deadline=None, max_examples=30)
@given(
    weights=st.dictionaries(
        st.sampled_from(NAMES), st.floats(0, 1e300) | st.integers(0, 10**30), min_size=1, max_size=9
    ).filter(lambda weights: any(weights.values()))
)
def test_shares_are_exact_and_sum_to_the_whole(weights: dict[str, float]) -> None:
    found = shares(weights)
    assert sum(found.values()) == WHOLE
    assert all(share > 0 for share in found.values())
    total = sum(weights.values())
    for name, weight in weights.items():
        assert abs(found.get(name, 0) - WHOLE * (weight / total)) <= 1 + WHOLE * 1e-15


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": -1.0}, "the weight of a is -1.0; it must be a number from 0 up"),
        ({"a": float("nan")}, "the weight of a is nan"),
        ({"a": 0, "b": 0.0}, "the weights of a, b are all 0"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shares(weights)


def test_a_source_without_windows_may_be_named_but_not_used() -> None:
    sources = [Source("a", 5), Source("empty", 0)]
    Order(sources, [Phase(0, shares({"a": 1}))], 0)
    with pytest.raises(ValueError, match="source empty holds no window"):
        Order(sources, [Phase(0, shares({"a": 1})), Phase(9, shares({"empty": 1}))], 0)


def test_every_source_is_used_as_its_weight_says() -> None:
    sources = [Source(name, 1000) for name in "abc"]
    order = Order(sources, [Phase(0, shares({"a": 0.7, "b": 0.2, "c": 0.1}))], 5)
    taken = Counter(source for source, _ in pairs(order, 0, 100 * BLOCK))
    assert [taken[n] / (100 * BLOCK) for n in range(3)] == pytest.approx([0.7, 0.2, 0.1], abs=1e-4)
