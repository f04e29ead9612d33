"""An application that answers when it is told to: what HAProxy does meanwhile is not a matter of models."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from ray import serve
from ray.serve import Application


class Waiting:
    """Answers with the id of its process."""

    def __init__(self) -> None:
        self._left = 0

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = FastAPI()

        @api.post("/unary")
        async def unary(seconds: float) -> int:
            """Answer after some seconds."""
            try:
                await asyncio.sleep(seconds)
            except asyncio.CancelledError:
                self._left += 1
                raise
            return os.getpid()

        @api.post("/stream")
        async def stream(items: int, seconds: float, size: int = 0) -> StreamingResponse:
            """Send an item of so many bytes at once, and the others after so many seconds each."""

            async def send() -> AsyncIterator[str]:
                yield f"{os.getpid()}\n"
                for _ in range(items):
                    await asyncio.sleep(seconds)
                    yield "x" * size + "\n"

            return StreamingResponse(send())

        @api.get("/left")
        async def left() -> tuple[int, int]:
            """Return the id of this process, and how many clients of its `/unary` have left."""
            return os.getpid(), self._left

        return api


def waiting(processes: int) -> Application:
    """Return the application with so many processes, deployed like the API."""
    application: Application = serve.deployment(
        name="Waiting",
        num_replicas=processes,
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=1000,
        health_check_period_s=1,
        health_check_timeout_s=2,
        graceful_shutdown_timeout_s=30,
    )(serve.ingress()(Waiting)).bind()
    return application
