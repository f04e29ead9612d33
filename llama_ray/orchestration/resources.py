"""What the Ray cluster has for a run, or could grow to."""

from __future__ import annotations

import os

import ray
from ray._private.state import state as cluster_state


def uses_gpu() -> bool:
    """Whether the cluster has GPUs now, or would add nodes that have."""
    return _most("GPU") > 0


def check_workers(count: int, *, gpu: bool, flag: str = "world_size", each: int = 1) -> None:
    """Raise ValueError for more workers than the cluster can ever have: `each` GPUs, or CPUs without GPUs, for one.

    `flag` is what the user set their number with.
    """
    if count < 1:
        raise ValueError(f"{flag} is {count}; it must be at least 1")
    kind = "GPU" if gpu else "CPU"
    most = int(_most(kind))
    if most < each:
        raise ValueError(
            f"a worker takes {each} {kind}s, but this cluster has at most {most}; ask for fewer, or add nodes"
        )
    if count * each > most:
        raise ValueError(
            f"{flag} is {count}, but this cluster has at most {most} {kind}{'' if most == 1 else 's'} and a "
            f"worker takes {'one' if each == 1 else each}; give --{flag} {most // each} or less, or add nodes"
        )


def nodes() -> int:
    """Machines of the cluster that are alive and take work."""
    return sum(bool(node["Alive"] and node["Resources"].get("CPU")) for node in ray.nodes())  # type: ignore[no-untyped-call]


def gpus() -> int:
    """GPUs that the cluster has now."""
    return int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]


def cpu_threads(workers_on_node: int) -> int:
    """Threads for a worker that computes on the CPU: its share of the cores this process may run on."""
    return max(1, len(os.sched_getaffinity(0)) // workers_on_node)


def _most(resource: str) -> float:
    now = float(ray.cluster_resources().get(resource, 0))  # type: ignore[no-untyped-call]
    # Ray has no public call for what an autoscaling cluster may become; None where nothing scales it.
    limits = cluster_state.get_max_resources_from_cluster_config() or {}
    return max(now, float(limits.get(resource) or 0))
