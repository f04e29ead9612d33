from __future__ import annotations

from typing import Any

import torch.distributed as dist

from llama_ray.training.hosts.group import HostGroup
from tests.training.helpers import in_processes


def exchange() -> dict[str, Any]:
    """Everything that a group exchanges, among all workers of the process group."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    group = HostGroup(timeout_s=60)
    group.barrier()
    return {
        "gather": group.gather({"rank": rank}),
        "broadcast": group.broadcast(f"from {rank}"),
        "one is true": group.any(rank == 0),
        "none is true": group.any(False),
    }


def test_workers_exchange_values_through_a_group_of_their_own() -> None:
    expected = {
        "gather": [{"rank": 0}, {"rank": 1}],
        "broadcast": "from 0",
        "one is true": True,
        "none is true": False,
    }
    assert in_processes(2, exchange) == [expected, expected]


def test_one_worker_needs_no_process_group() -> None:
    assert exchange() == {
        "gather": [{"rank": 0}],
        "broadcast": "from 0",
        "one is true": True,
        "none is true": False,
    }
