"""The HTTP application in front of the model replicas, and its deployment in Ray Serve."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from serve_app import environment
from serve_app.api import chat, completions, models, pages, questions, responses_api
from serve_app.api.access import KeyRequired, check_address
from serve_app.api.failures import add_handlers
from serve_app.api.generating import TEMPLATE_HEADER
from serve_app.api.metrics import RequestMetrics
from serve_app.api.middleware import BodyLimit, PanicsAsErrors
from serve_app.api.responses import VERSION_HEADER
from serve_app.routing.admission import QueueLimit
from serve_app.routing.client import ModelClient
from serve_app.routing.serve import serve_client

_log = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * 2**20
"""Default limit of a body: the token ids of more than a million tokens."""

Connect = Callable[[], AbstractAsyncContextManager[ModelClient]]
"""Connects to the models, in the event loop that serves HTTP, for as long as it does."""


@dataclass(frozen=True)
class HttpOptions:
    """What the API accepts: bodies of up to `max_body_bytes`, the keys of `key_digests` (without any, no key is asked
    for, and `allow_anonymous` lets it listen on a public address), and browsers' requests from pages of `cors_origins`.
    """

    max_body_bytes: int = MAX_BODY_BYTES
    key_digests: tuple[str, ...] = ()
    allow_anonymous: bool = False
    cors_origins: tuple[str, ...] = ()


class Api:
    """The deployment that receives HTTP requests.

    `follower` and `replicas` (by the names of their deployments) are those of the application. For
    `queue_limits` (by model) see `Admission`, for `resume_timeout_s` `ServeArgs`. Raises UserError if everybody could
    use it.
    """

    def __init__(
        self,
        follower: DeploymentHandle[Any],
        replicas: Mapping[str, DeploymentHandle[Any]],
        *,
        queue_limits: Mapping[str, QueueLimit],
        resume_timeout_s: float,
        http: HttpOptions = HttpOptions(),
    ) -> None:
        client = _get_global_client()
        assert client is not None
        host = client.http_config.host
        check_address(host, has_keys=bool(http.key_digests), allow_anonymous=http.allow_anonymous)
        self._connect = lambda: serve_client(follower, replicas, queue_limits, resume_timeout_s)
        self._http, self._metrics = http, RequestMetrics()
        # Here, because this process has what Ray has started with, and the one that deploys may not.
        if advice := environment.advice(os.environ):
            _log.warning(advice)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the application where it runs, so that it need not be pickled. Ray Serve calls this."""
        api = create_api(self._connect, self._http, self._metrics)
        # What is loaded by now stays. Otherwise the garbage collector looks at all of it, again and again, while a body
        # of a million small lists is parsed: 2 s instead of 0.6.
        gc.collect()
        gc.freeze()
        return api


def create_api(
    connect: Connect, http: HttpOptions = HttpOptions(), metrics: RequestMetrics | None = None
) -> FastAPI:
    """Return the HTTP application in front of the models."""

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        async with connect() as api.state.models:
            api.state.metrics = metrics
            yield

    api = FastAPI(
        title="llama_ray",
        description="A LLaMA model behind OpenAI's API. `GET /` is a playground.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    for routes in (completions, chat, responses_api, questions, models):
        routes.add_routes(api)
    pages.add_pages(api)
    add_handlers(api)
    # The last one that is added is the first that sees a request.
    api.add_middleware(BodyLimit, max_bytes=http.max_body_bytes)
    if http.key_digests:
        api.add_middleware(KeyRequired, digests=http.key_digests, open_paths=pages.OPEN_PATHS | {"/health"})
    if http.cors_origins:
        # Also around a refusal, which a browser would not show otherwise.
        api.add_middleware(
            CORSMiddleware,
            allow_origins=http.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[VERSION_HEADER, TEMPLATE_HEADER, "x-request-id", "retry-after"],
        )
    api.add_middleware(PanicsAsErrors)
    return api
