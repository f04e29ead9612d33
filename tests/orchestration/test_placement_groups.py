from __future__ import annotations

import os
import signal

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from llama_ray.orchestration.placement_groups import remove_orphans


@ray.remote(num_cpus=0)
class Creator:
    def create(self) -> tuple[PlacementGroup, int]:
        group = placement_group([{"CPU": 1}])
        ray.get(group.ready())
        return group, os.getpid()


def exists(group: PlacementGroup) -> bool:
    return placement_group_table(group)["state"] == "CREATED"


def test_what_dead_actors_have_made_is_removed_and_nothing_else(ray_cluster: str) -> None:
    mine = placement_group([{"CPU": 1}])
    ray.get(mine.ready())
    alive, dead = Creator.remote(), Creator.remote()
    of_alive, _ = ray.get(alive.create.remote())
    of_dead, pid = ray.get(dead.create.remote())
    os.kill(pid, signal.SIGKILL)
    remove_orphans(patience_s=2.0)
    assert exists(mine)
    assert exists(of_alive)
    assert not exists(of_dead)
    # An actor that ends because nobody refers to it is waited for.
    del alive
    remove_orphans()
    assert exists(mine)
    assert not exists(of_alive)
    remove_placement_group(mine)
