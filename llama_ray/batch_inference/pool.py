"""Ray Data's pool of replicas, which partitions flow through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.data import ActorPoolStrategy

from llama_ray.batch_inference.actor_pool import map_on_actors
from llama_ray.batch_inference.config import BatchError
from llama_ray.batch_inference.partition_file import Counts
from llama_ray.batch_inference.partitions import MIN_PARTITION_ROWS, Partition
from llama_ray.batch_inference.replica import Replica, ReplicaConfig
from llama_ray.orchestration.resources import check_workers, gpus, nodes, uses_gpu
from llama_ray.utils.errors import first_line
from llama_ray.utils.integers import ceil_div

_MAX_WORKER_DEATHS = 15
"""Deaths of the workers on one partition before the job ends. Rows that kill a process are found after fewer deaths,
unless there are many of them; `attempts` continues to count when the job is started again."""
_MAX_PARTITIONS_IN_FLIGHT = 8


@dataclass(frozen=True)
class PoolSize:
    """How many replicas, each with how many GPUs; without a GPU each has one of Ray's CPUs."""

    replicas: int
    gpus_per_replica: int

    @classmethod
    def of(cls, device: str | None, replicas: int | None, tensor_parallel: int) -> PoolSize:
        """Size the pool for this cluster. Raises ValueError if the cluster has too little for what is asked."""
        gpu = device != "cpu" and uses_gpu()
        if device == "cuda" and not gpu:
            raise BatchError(
                "device is cuda, but this cluster has no GPU; give --device cpu, or add GPU nodes"
            )
        each = tensor_parallel if gpu else 1
        if replicas is None:
            replicas = max(1, gpus() // each if gpu else nodes())
        check_workers(replicas, gpu=gpu, flag="replicas", each=each)
        return cls(replicas, each if gpu else 0)

    @property
    def device(self) -> str:
        """The device that each replica computes on."""
        return "cuda" if self.gpus_per_replica else "cpu"


def answer_partitions(
    partitions: Sequence[Partition],
    size: PoolSize,
    config: ReplicaConfig,
    max_num_seqs: int,
    env_vars: Mapping[str, str],
) -> Iterator[Counts]:
    """Answer and commit `partitions`; yield the counts of each as it is finished. Raises BatchError."""
    # Enough for an engine of `max_num_seqs` to have two batches of rows.
    in_flight = min(_MAX_PARTITIONS_IN_FLIGHT, 1 + ceil_div(2 * max_num_seqs, MIN_PARTITION_ROWS))
    results = map_on_actors(
        Replica,
        config,
        [{"partition": partition.to_json()} for partition in partitions],
        ActorPoolStrategy(
            size=size.replicas,
            max_tasks_in_flight_per_actor=in_flight,
            max_concurrent_calls_per_actor=in_flight,
            enable_true_multi_threading=True,
        ),
        gpus=size.gpus_per_replica,
        max_deaths=_MAX_WORKER_DEATHS,
        env_vars=env_vars,
    )
    try:
        for result in results:
            if result["failure"]:
                raise BatchError(result["failure"])
            yield Counts(**{name: result[name] for name in vars(Counts())})
    except ray.exceptions.RayActorError as error:
        raise BatchError(
            f"the workers on one partition died {_MAX_WORKER_DEATHS + 1} times ({first_line(error)}); finished "
            "partitions are kept; start the job again, with a smaller --max_num_seqs if memory was short"
        ) from error
