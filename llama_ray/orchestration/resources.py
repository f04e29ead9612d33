"""The resources of the Ray cluster, now and at its largest size."""

from __future__ import annotations

import os

import ray

from llama_ray.utils.ray_cluster import largest


def uses_gpu() -> bool:
    """Return whether the cluster has GPUs now or can add nodes with GPUs."""
    return largest("GPU") > 0


def check_workers(count: int, *, gpu: bool, flag: str = "world_size", each: int = 1) -> None:
    """Raise ValueError unless the cluster can ever run `count` workers of `each` GPUs, or of `each` CPUs if not `gpu`.

    A worker with GPUs takes one CPU, too. `flag` is the name of the flag that sets their number.
    """
    if count < 1:
        raise ValueError(f"{flag} is {count}; it must be at least 1")
    for kind, share in {"GPU": each, "CPU": 1}.items() if gpu else {"CPU": each}.items():
        most = int(largest(kind))
        if most < share:
            raise ValueError(
                f"a worker needs {share} {kind}{'' if share == 1 else 's'}, but this cluster has at most {most}; "
                f"{'' if share == 1 else 'give it fewer, or '}add nodes"
            )
        if count * share > most:
            raise ValueError(
                f"{flag} is {count}, but this cluster has at most {most} {kind}{'' if most == 1 else 's'} and a "
                f"worker needs {'one' if share == 1 else share}; give --{flag} {most // share} or less, or add nodes"
            )


def nodes() -> int:
    """Return the number of live nodes that run work."""
    return sum(bool(node["Alive"] and node["Resources"].get("CPU")) for node in ray.nodes())  # type: ignore[no-untyped-call]


def gpus() -> int:
    """Return the number of GPUs that the cluster has now."""
    return int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]


def cpu_threads(workers_on_node: int) -> int:
    """Return the threads of a CPU worker: its share of the cores that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // workers_on_node)
