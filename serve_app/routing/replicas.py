"""How a submission reaches a replica: by a call of Ray Serve, which chooses the replica, counts it, and drains it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.streams.messages import Answered, Submission
from serve_app.streams.receiver import Lost


class Replicas(Protocol):
    """The model replicas, by deployment."""

    async def submit(self, deployment: str, submission: Submission) -> Answered:
        """Have a replica answer, and return when it has ended.

        Raises Lost if no replica could, or the one that did has gone. Cancelling ends the request.
        """


class ServeReplicas:
    """The replicas behind the handles of their deployments."""

    def __init__(self, handles: Mapping[str, DeploymentHandle[Any]]) -> None:
        self._handles = handles

    async def submit(self, deployment: str, submission: Submission) -> Answered:
        """See `Replicas`."""
        response = self._handles[deployment].generate.remote(submission)
        try:
            answered: Answered = await response
        except asyncio.CancelledError:
            response.cancel()  # type: ignore[no-untyped-call]
            raise
        except (RayError, RayServeException) as error:
            raise Lost(_reason(error), failed=isinstance(error, RayTaskError)) from error
        return answered


def _reason(error: Exception) -> str:
    if isinstance(error, RayActorError):
        return "the replica that was answering has died"
    # Ray's reports end with the error itself; the traceback before it does not help a client.
    return (str(error) or type(error).__name__).strip().splitlines()[-1]
