"""What the follower needs of Ray: a store for the cluster, and the end of a replica that does not run any more."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from serve_app.registry.follower import ClusterStore, kill
from serve_app.registry.messages import ReplicaReport


def test_the_cluster_keeps_what_was_put_last(ray_cluster: str) -> None:
    store = ClusterStore()
    assert store.get("never") is None
    for text in ("first", "second ü"):
        store.put("kept", text)
    assert store.get("kept") == "second ü"


class Worker:
    def pid(self) -> int:
        return os.getpid()


def test_a_process_that_is_stopped_is_ended(ray_cluster: str) -> None:
    actor: Any = ray.remote(num_cpus=0)(Worker).options(name="stopped", namespace="serve").remote()
    os.kill(ray.get(actor.pid.remote()), signal.SIGSTOP)
    answer = actor.pid.remote()
    kill(ReplicaReport("r", "stopped", "d", "llama"))
    with pytest.raises(RayActorError):
        ray.get(answer, timeout=60)
    # It is not there any more, which is no error.
    kill(ReplicaReport("r", "stopped", "d", "llama"))
