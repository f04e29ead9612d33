"""Some seconds of `benchmarks/fuzz.py`, with the same requests each time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzzing import Asked, Fuzzer, requests


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_random_requests_get_among_others_what_they_get_alone(one_thread: None) -> None:
    fuzzer = Fuzzer(max_step_cpu_s=10)

    @given(requests(fuzzer.tokenizer), st.integers(0, 3))
    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        # A failure is shown as it is found: making it smaller takes minutes.
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    def run(asked: Sequence[Asked], which: int) -> None:
        fuzzer.check(asked, which)

    run()
    counts = fuzzer.finish().counts
    assert counts["requests"] > 300
    events = ("preemptions", "evictions", "aborts", "grammars", "resumed")
    assert min(counts[event] for event in events) > 30, counts
