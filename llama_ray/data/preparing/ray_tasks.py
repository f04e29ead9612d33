"""Tasks on a Ray cluster, one for each row; the only file of `data` that knows Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import ray.data

from llama_ray.utils.ray_cluster import largest

Row = dict[str, Any]


def run_tasks(task: Callable[[Row], Row], rows: Sequence[Row], workers: int | None) -> Iterator[Row]:
    """Yield what `task` returns for each row, in the order in which the tasks end; at most `workers` run at once.

    Ray Data runs no more of them than there are CPUs, and runs a task again whose process or node is lost.
    """
    if not rows:
        return
    # The lines that we log are easier to read in a job's log.
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows))
    at_once = None if workers is None else ray.data.TaskPoolStrategy(size=min(workers, len(rows)))
    yield from dataset.map(task, compute=at_once).iter_rows()


def start_ray() -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start one on this machine."""
    ray.init(log_to_driver=False)


def check_cpus(log: Callable[[str], None], connect: Callable[[], None]) -> None:
    """Raise ValueError if the cluster has no CPU and can add none: tasks would wait for one without a word.

    `connect` is called if this process has no cluster yet.
    """
    if not ray.is_initialized():
        connect()
    cpus = largest("CPU")
    if cpus < 1:
        raise ValueError(f"this cluster has {cpus:g} CPUs; preparing data needs 1; add a node with CPUs")
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    if free.get("CPU", 0) < 1:
        log("all CPUs of the cluster are in use; waiting for one")
