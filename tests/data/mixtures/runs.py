"""A mixture, and the workers of a run over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama_ray.data.mixtures.loader import Loader
from llama_ray.data.mixtures.mixture import Mixture
from llama_ray.data.mixtures.stages import Stage

WINDOW = 8
SIZES = {"code": 17, "math": 5, "web": 40}
WEIGHTS = {"code": 1.0, "math": 0.0, "web": 3.0}


@dataclass(frozen=True)
class Cluster:
    """How the global batch, of 12 windows at first, is divided."""

    world: int
    batch: int
    accumulation: int
    prefetch: int = 0


CLUSTERS = [
    Cluster(1, 12, 1),
    Cluster(1, 3, 4, prefetch=2),
    Cluster(2, 2, 3),
    Cluster(3, 4, 1, prefetch=1),
    Cluster(4, 1, 3),
]
STAGES = [
    Stage(from_step=3, seq_len=4),
    Stage(from_step=4, weights={"math": 1, "web": 1}),
    Stage(from_step=7, batch_tokens=24 * WINDOW, seq_len=2),
    Stage(from_step=9, seq_len=8, weights={"math": 1}),
]


def loaders(mixture: Mixture, cluster: Cluster, stages: Sequence[Stage], seed: int = 0) -> list[Loader]:
    return [
        Loader(
            mixture, seq_len=WINDOW, batch_size=cluster.batch, rank=rank, world_size=cluster.world, seed=seed,
            gradient_accumulation_steps=cluster.accumulation, stages=stages, prefetch=cluster.prefetch,
        )
        for rank in range(cluster.world)
    ]  # fmt: skip


def take(workers: Sequence[Loader]) -> list[list[int]]:
    """Take a step on all workers, and return the rows of its global batch in their order."""
    parts = [worker.next_global_batch() for worker in workers]
    assert len({len(part) for part in parts}) == 1
    return [
        row
        for micro_step in zip(*parts, strict=True)
        for batch in micro_step
        for row in batch.inputs.tolist()
    ]


def close(workers: Sequence[Loader]) -> None:
    for worker in workers:
        worker.close()
