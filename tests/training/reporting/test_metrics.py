from __future__ import annotations

import pytest

from llama_ray.training.reporting.metrics import Throughput


def test_mfu_counts_the_operations_of_each_stage() -> None:
    """A token of a longer sequence takes more operations."""
    throughput = Throughput(peak_flops=1e12, world_size=2)
    throughput.count(30, flops_per_token=200)
    throughput.count(10, flops_per_token=600)
    tokens_per_s, mfu = throughput.read()
    assert mfu * 2e12 / tokens_per_s == pytest.approx((30 * 200 + 10 * 600) / 40)
