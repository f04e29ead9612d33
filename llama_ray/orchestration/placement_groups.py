"""Placement groups whose creator is gone."""

from __future__ import annotations

import threading
import time

import ray
from ray._private.state import state as cluster_state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]  # generated code
from ray.util.placement_group import PlacementGroup, remove_placement_group

_LOOK_S = 0.1


def remove_orphans(patience_s: float = 5.0) -> None:
    """Remove the placement groups of this driver that were made by actors which are dead by now.

    Ray itself keeps them until the driver ends. Waits up to `patience_s` for actors that are ending.
    """
    deadline = time.monotonic() + patience_s
    pause = threading.Event()
    while made_by_actors := _made_by_actors():
        for group in made_by_actors:
            if group.creator_actor_dead:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
        if time.monotonic() > deadline:
            break
        pause.wait(_LOOK_S)


def _made_by_actors() -> list[PlacementGroupTableData]:
    """Return the placement groups that actors of this driver's job have made and that still exist."""
    # `ray.util.placement_group_table` does not tell who made a group.
    table = cluster_state._connect_and_get_accessor().get_placement_group_table()
    groups = [PlacementGroupTableData.FromString(entry) for entry in table]
    job = ray.get_runtime_context().get_job_id()
    return [
        group
        for group in groups
        if group.creator_job_id.hex() == job
        and not ray.ActorID(group.creator_actor_id).is_nil()
        and group.state != PlacementGroupTableData.REMOVED
    ]
