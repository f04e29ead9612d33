"""How many replicas a standby gets, in the store of a real Ray."""

from __future__ import annotations

from typing import Any

from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve_app.scaling import StandbyPolicy, tell_standby


def decide(policy: StandbyPolicy, application: str, *, running: int, target: int, requests: float = 0) -> int:
    """What the policy says to a standby with `running` replicas, which aims at two requests for each of them."""
    unused: dict[str, Any] = dict.fromkeys(
        ("aggregated_metrics", "raw_metrics", "last_scale_up_time", "last_scale_down_time", "current_time")
    )
    context = AutoscalingContext(
        deployment_id=DeploymentID("LlamaStandby", application),
        deployment_name="LlamaStandby",
        app_name=application,
        current_num_replicas=running,
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=requests,
        total_queued_requests=0,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=9,
        policy_state={},
        config=AutoscalingConfig(min_replicas=0, max_replicas=9, target_ongoing_requests=2),
        **unused,
    )
    replicas, _ = policy(context)
    return replicas


def test_a_standby_has_what_the_follower_says_and_more_under_load(ray_cluster: str) -> None:
    tell_standby("a", "1", {"LlamaStandby": 2})
    assert decide(StandbyPolicy("1"), "a", running=0, target=0) == 2
    assert decide(StandbyPolicy("1"), "a", running=2, target=2, requests=9) == 5
    # Its load has gone down, but it is needed for minutes only.
    assert decide(StandbyPolicy("1"), "a", running=5, target=5) == 5
    tell_standby("a", "1", {"LlamaStandby": 0})
    assert decide(StandbyPolicy("1"), "a", running=5, target=5, requests=9) == 0


def test_the_number_stays_until_the_follower_of_the_same_deployment_speaks(ray_cluster: str) -> None:
    tell_standby("b", "old", {"LlamaStandby": 2})
    for application in ("b", "never heard of"):
        assert decide(StandbyPolicy("new"), application, running=0, target=0) == 0
        assert decide(StandbyPolicy("new"), application, running=3, target=3) == 3
