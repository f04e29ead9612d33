"""How the API reaches a model: the interface that it needs, and its implementation by a Ray Serve deployment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import ReplicaState  # type: ignore[attr-defined]

from serve_app.errors import ApiError
from serve_app.protocol.completions import Health
from serve_app.streams.messages import ChoiceDelta, Failure, GenerationRequest, ModelInfo, Started

PROBE_TIMEOUT_S = 0.5
"""Below the one second that load balancers commonly wait for /health."""

Events = AsyncGenerator[Started | list[ChoiceDelta]]


class ModelClient(Protocol):
    """What the API needs of a model, wherever it runs. All errors are ApiErrors."""

    async def info(self) -> ModelInfo:
        """Return which model is served."""

    async def check(self) -> Health:
        """Raise ApiError (503) unless the model can answer."""

    def generate(self, request: GenerationRequest) -> Events:
        """Yield `Started`, then lists of deltas. Closing the iterator frees all that the request holds."""


class ReplicaClient:
    """The replicas of the deployment behind `handle`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def info(self) -> ModelInfo:
        """Ask a replica which model it serves."""
        try:
            info: ModelInfo = await self._handle.info.remote()
        except (RayError, RayServeException) as error:
            raise _unavailable(error) from error
        return info

    async def check(self) -> Health:
        """Ask a replica. If none answers in time, the controller, which checks all of them, decides."""
        try:
            await asyncio.wait_for(self._handle.info.remote(), PROBE_TIMEOUT_S)
        except (TimeoutError, BackPressureError, DeploymentUnavailableError) as error:
            status = await asyncio.to_thread(serve.status)
            deployment = status.applications[self._handle.app_name].deployments[self._handle.deployment_name]
            if deployment.replica_states.get(ReplicaState.RUNNING):
                return Health(status="busy")
            raise _unavailable(error, deployment.message or "it is starting") from error
        except (RayError, RayServeException) as error:
            raise _unavailable(error) from error
        return Health(status="ok")

    async def generate(self, request: GenerationRequest) -> Events:
        """See `ModelClient`. A lost replica ends the request with an ApiError, also in the middle of a text."""
        response = self._handle.options(stream=True).generate.remote(request)
        assert isinstance(response, DeploymentResponseGenerator)
        try:
            async for event in response:
                if isinstance(event, Failure):
                    raise ApiError(event.status, event.message, param=event.param, code=event.code)
                yield event
        except (RayError, RayServeException) as error:
            raise _unavailable(error) from error
        except (GeneratorExit, asyncio.CancelledError):  # The client has gone away.
            response.cancel()  # type: ignore[no-untyped-call]
            raise


def _unavailable(error: Exception, reason: str | None = None) -> ApiError:
    if isinstance(error, BackPressureError) and reason is None:
        message = "the server's queue of requests is full; try again later"
        return ApiError(429, message, code="overloaded", retry_after_s=1)
    if isinstance(error, DeploymentUnavailableError):
        reason = reason or "its deployment failed; GET /health says why"
    elif isinstance(error, RayActorError):
        reason = "the replica that was answering has died; send the request again"
    # Ray's reports end with the error itself; the traceback before it does not help a client.
    last_line = (reason or str(error) or type(error).__name__).strip().splitlines()[-1]
    return ApiError(503, f"the model is not available: {last_line}", code="unavailable", retry_after_s=5)
