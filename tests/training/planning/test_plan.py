"""The time of a step follows from operations, bytes and rates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llama_ray.training.parallel.layout import GIB
from llama_ray.training.planning.plan import Cluster, make_plan
from tests.training.helpers import DDP, FSDP, HSDP, TP, Settings
from tests.training.planning.helpers import MODEL, RUN

SLOW = Cluster(gpus=4, gpu_memory_bytes=80 * GIB, gpus_per_node=2, node_bandwidth=1e9, network_bandwidth=1e6)
"""Two nodes whose GPUs communicate for much longer than they compute."""


def test_computing_takes_the_operations_over_the_assumed_rate() -> None:
    cluster = Cluster(gpus=1, gpu_memory_bytes=80 * GIB, gpu_flops=1e12)
    plan = make_plan(MODEL, RUN, cluster, mfu=0.5)
    seconds = 4 * 128 * MODEL.flops_per_token(128) / (1e12 * 0.5)
    assert plan.step_s == pytest.approx(seconds)
    assert plan.days(plan.tokens_per_step * 86400) == pytest.approx(seconds)


def test_a_step_takes_the_longer_of_computing_and_overlapped_communication() -> None:
    ddp = make_plan(MODEL, replace(RUN, **DDP, gradient_accumulation_steps=3), SLOW)
    # Gradients once per step. An all-reduce passes them twice around a ring over two nodes; half of each pass goes
    # through the two adapters of a node.
    all_reduce_s = 2 * 4 * MODEL.num_parameters() * (1 / 2) / (2 * 1e6) / SLOW.reached
    assert ddp.compute_s < 0.01 * all_reduce_s
    assert ddp.step_s == pytest.approx(all_reduce_s)

    fast = replace(SLOW, node_bandwidth=1e15, network_bandwidth=1e15)
    assert replace(ddp, cluster=fast).step_s == pytest.approx(ddp.compute_s)


def test_tensor_parallel_communication_is_waited_for_and_stays_within_a_node() -> None:
    plan = make_plan(MODEL, replace(RUN, **FSDP, **TP), SLOW)
    assert plan.waited_s > 0
    assert plan.step_s == pytest.approx(plan.overlapped_s + plan.waited_s)
    faster_network = replace(SLOW, network_bandwidth=1e7)
    assert replace(plan, cluster=faster_network).waited_s == pytest.approx(plan.waited_s, rel=1e-2)


def overlapped(layout: Settings, micro_steps: int) -> float:
    cluster = Cluster(gpus=4, gpu_memory_bytes=80 * GIB, gpus_per_node=2)
    run = replace(RUN, gradient_accumulation_steps=micro_steps, **layout)
    return make_plan(MODEL, run, cluster).overlapped_s


def test_fsdp_communicates_in_every_micro_step() -> None:
    assert overlapped(FSDP, 6) == pytest.approx(6 * overlapped(FSDP, 1), rel=0.01)


def test_ddp_communicates_once_per_step() -> None:
    assert overlapped(DDP, 6) == pytest.approx(overlapped(DDP, 1))


def test_hsdp_communicates_in_every_micro_step_except_between_replicas() -> None:
    assert overlapped(HSDP, 1) < overlapped(HSDP, 6) < 6 * overlapped(HSDP, 1)


@pytest.mark.parametrize("mfu", [0, 40])
def test_an_impossible_mfu_is_refused(mfu: float) -> None:
    with pytest.raises(ValueError, match=f"mfu is {mfu}; it must be above 0 and at most 1"):
        make_plan(MODEL, RUN, SLOW, mfu=mfu)


def test_a_cluster_without_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="gpu_memory_bytes is 0; it must be at least 1"):
        Cluster(gpus=1, gpu_memory_bytes=0)
