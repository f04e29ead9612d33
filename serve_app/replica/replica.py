"""The deployment of model replicas: Ray Serve's calls, on top of the engines that the follower's plan wants."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from llama_ray.generation.completion import GenerationError
from llama_ray.generation.options import EngineOptions
from llama_ray.generation.stats import EngineStats
from serve_app.registry.handle import FollowerHandle
from serve_app.registry.messages import AdapterVersion, ModelSpec, ReplicaReport
from serve_app.replica.engines import Engines
from serve_app.replica.following import Following
from serve_app.replica.health import Watchdog
from serve_app.replica.loader import DEFAULT_OPTIONS, DType, EngineLoader
from serve_app.replica.questions import reply
from serve_app.replica.served_engine import ServedEngine
from serve_app.streams.messages import Answered, Submission
from serve_app.streams.questions import Question, Reply
from serve_app.streams.sender import Sender


class LlamaReplica:
    """Answers requests for the versions of one model that `follower` names.

    On the CPU, at most `threads` compute, and no more than this process has cores. For the other arguments see
    `EngineLoader` and `Watchdog`. Raises ValueError if no version can be served; Serve then reports the deployment as
    failed, with that message.
    """

    # Serve awaits it. The loop goes on meanwhile, and so do the checks of health.
    async def __init__(  # type: ignore[misc]
        self,
        spec: ModelSpec,
        follower: DeploymentHandle[Any],
        tracking_uri: str | None = None,
        *,
        device: Literal["cpu", "cuda"] = "cpu",
        threads: int = 1,
        dtype: DType | None = None,
        options: EngineOptions = DEFAULT_OPTIONS,
        gate_timeout_s: float = 60.0,
        memory_bytes: int | None = None,
        stuck_after_s: float = 60.0,
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch sees no GPU here; install a CUDA build of torch, or set num_gpus to 0")
        torch.set_num_threads(max(1, min(threads, len(os.sched_getaffinity(0)))))
        loader = EngineLoader(tracking_uri, device, dtype, options, gate_timeout_s, memory_bytes)
        self._engines = Engines(loader, partial(ServedEngine, fetch=loader.local))
        self._watchdog = Watchdog(lambda: self._engines.served, stuck_after_s)
        self._sender = Sender()
        following = Following(FollowerHandle(follower), self._engines, _identity(spec))
        await following.until_ready()
        self._following = asyncio.create_task(following.forever())

    async def generate(self, submission: Submission) -> Answered:
        """Send the events of a request to the API, and return after the last one.

        Cancelling frees what the request holds in the engine. Raises OSError if the API cannot be reached.
        """
        connection = await self._sender.connect(submission.reply_to)
        served = self._engines.get(submission.ref)
        return "not_loaded" if served is None else await served.answer(submission, connection)

    async def ask(self, ref: str, question: Question, adapter: AdapterVersion | None = None) -> Reply | None:
        """Return the answer of the version `ref`, with an adapter if one is named.

        None if the version is not loaded here, or its engine has ended.
        """
        served = self._engines.get(ref)
        if served is None:
            return None
        try:
            return await reply(served, question, adapter)
        except GenerationError:
            return None

    async def stats(self) -> Mapping[str, EngineStats]:
        """Return what the engine of each version is doing and has done."""
        return {served.version.ref: served.engine.stats for served in self._engines.served}

    async def check_health(self) -> None:
        """Raise GenerationError if an engine has ended or is stuck; Serve calls this and replaces such a replica."""
        self._watchdog.check()


def _identity(spec: ModelSpec) -> ReplicaReport:
    context = serve.get_replica_context()
    return ReplicaReport(
        replica=context.replica_id.unique_id,
        actor=context.replica_id.to_full_id_str(),
        deployment=context.deployment,
        model=spec.name,
    )
