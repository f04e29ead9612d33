"""The resources of the Ray cluster that this process is connected to."""

from __future__ import annotations

import ray
from ray._private.state import state as cluster_state


def largest(resource: str) -> float:
    """Return how much of `resource` ('CPU', 'GPU') the cluster has now, or has when it has grown to its limit."""
    now = float(ray.cluster_resources().get(resource, 0))  # type: ignore[no-untyped-call]
    # Ray has no public call for the limits of an autoscaling cluster; None means that the cluster does not scale.
    limits = cluster_state.get_max_resources_from_cluster_config() or {}
    return max(now, float(limits.get(resource) or 0))
