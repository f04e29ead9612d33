"""Connects a process of the API to the follower and the replicas of its application in Ray Serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.registry.handle import FollowerHandle
from serve_app.routing.admission import Admission, QueueLimit
from serve_app.routing.client import RoutedClient
from serve_app.routing.replicas import ServeReplicas
from serve_app.routing.tables import Tables
from serve_app.streams.receiver import Receiver


@asynccontextmanager
async def serve_client(
    follower: DeploymentHandle[Any],
    replicas: Mapping[str, DeploymentHandle[Any]],
    queue_limits: Mapping[str, QueueLimit],
    resume_timeout_s: float,
) -> AsyncIterator[RoutedClient]:
    """Give a client of the models that listens for their replicas."""
    api = serve.get_replica_context().replica_id.to_full_id_str()
    tables = Tables(FollowerHandle(follower), api)
    receiver = await Receiver.listen(str(ray.util.get_node_ip_address()))  # type: ignore[no-untyped-call]
    watching = asyncio.create_task(tables.watch())
    try:
        yield RoutedClient(
            tables, ServeReplicas(replicas), receiver, Admission(queue_limits), resume_timeout_s
        )
    finally:
        watching.cancel()
        receiver.close()
