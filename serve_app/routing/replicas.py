"""How a submission reaches a replica: by a call of Ray Serve, which chooses the replica, counts it, and drains it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

import grpc
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from serve_app.registry.messages import AdapterVersion
from serve_app.routing.cancellation import raise_if_cancelled
from serve_app.streams.messages import Answered, Submission
from serve_app.streams.questions import Question, Reply
from serve_app.streams.receiver import Lost


class Replicas(Protocol):
    """The model replicas, by deployment."""

    async def submit(self, deployment: str, submission: Submission) -> Answered:
        """Have a replica answer, and return when it has ended.

        Raises Lost if no replica could, or the one that did has gone. Cancelling ends the request.
        """

    async def ask(
        self, deployment: str, ref: str, question: Question, adapter: AdapterVersion | None = None
    ) -> Reply:
        """Have a replica answer a question about the version `ref`, with an adapter. Raises Lost as `submit` does."""


class ServeReplicas:
    """The replicas behind the handles of their deployments."""

    def __init__(self, handles: Mapping[str, DeploymentHandle[Any]]) -> None:
        self._handles = handles

    async def submit(self, deployment: str, submission: Submission) -> Answered:
        """See `Replicas`."""
        answered: Answered = await _result(self._handles[deployment].generate.remote(submission))
        return answered

    async def ask(
        self, deployment: str, ref: str, question: Question, adapter: AdapterVersion | None = None
    ) -> Reply:
        """See `Replicas`."""
        reply: Reply | None = await _result(self._handles[deployment].ask.remote(ref, question, adapter))
        if reply is None:
            raise Lost("the replica does not have that version")
        return reply


async def _result(response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any]) -> Any:
    assert isinstance(response, DeploymentResponse)
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()  # type: ignore[no-untyped-call]
        raise_if_cancelled()
        raise Lost("the replica that was answering has dropped the call") from None
    except (RayError, RayServeException, grpc.RpcError) as error:
        raise Lost(_reason(error), failed=isinstance(error, RayTaskError)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, RayActorError):
        return "the replica that was answering has died"
    # Ray's reports end with the error itself; the traceback before it does not help a client.
    return (str(error) or type(error).__name__).strip().splitlines()[-1]
