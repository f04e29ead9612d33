"""HTTP in front of the model replicas: OpenAI's completions API, the playground, health."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from serve_app import environment
from serve_app.api.disconnect import while_connected
from serve_app.api.metrics import RequestMetrics
from serve_app.api.middleware import BodyLimit, PanicsAsErrors
from serve_app.api.responses import VERSION_HEADER, CompletionWriter, EventStream
from serve_app.errors import (
    CLIENT_GONE,
    INTERNAL_ERROR,
    ApiError,
    ErrorResponse,
    error_response,
    validation_error,
)
from serve_app.protocol.completions import CompletionRequest, CompletionResponse
from serve_app.protocol.generation import GenerationRequest
from serve_app.protocol.models import Health, ModelCard, ModelList, Ready, cards, ready
from serve_app.routing.choice import not_served
from serve_app.routing.client import Accepted, ModelClient
from serve_app.routing.serve import serve_client

_log = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * 2**20
"""Default limit of a body: the token ids of more than a million tokens."""
_PLAYGROUND = Path(__file__).parent / "playground" / "index.html"
# Otherwise FastAPI documents its own error object, with status 422.
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 404, 413, 422, 429, 500, 503)
}

Connect = Callable[[], AbstractAsyncContextManager[ModelClient]]
"""Connects to the models, in the event loop that serves HTTP, for as long as it does."""


class Api:
    """The deployment that receives HTTP requests.

    `follower` and `replicas` (by the names of their deployments) are those of the application. For
    `max_queued_requests` (by model) and `resume_timeout_s` see `ServeArgs`.
    """

    def __init__(
        self,
        follower: DeploymentHandle[Any],
        replicas: Mapping[str, DeploymentHandle[Any]],
        *,
        max_queued_requests: Mapping[str, int],
        resume_timeout_s: float,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._connect = lambda: serve_client(follower, replicas, max_queued_requests, resume_timeout_s)
        self._max_body_bytes, self._metrics = max_body_bytes, RequestMetrics()
        # Here, because this process has what Ray has started with, and the one that deploys may not.
        if advice := environment.advice(os.environ):
            _log.warning(advice)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the application where it runs, so that it need not be pickled. Ray Serve calls this."""
        api = create_api(self._connect, self._max_body_bytes, self._metrics)
        # What is loaded by now stays. Otherwise the garbage collector looks at all of it, again and again, while a body
        # of a million small lists is parsed: 2 s instead of 0.6.
        gc.collect()
        gc.freeze()
        return api


def create_api(
    connect: Connect, max_body_bytes: int = MAX_BODY_BYTES, metrics: RequestMetrics | None = None
) -> FastAPI:
    """Return the HTTP application in front of the models; a larger body than `max_body_bytes` is refused."""

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        async with connect() as api.state.model:
            api.state.metrics = metrics
            yield

    api = FastAPI(
        title="llama_ray",
        description="A LLaMA model behind OpenAI's completions API. `GET /` is a playground.",
        redoc_url=None,
        lifespan=lifespan,
    )
    page = _PLAYGROUND.read_text(encoding="utf-8")

    @api.post("/v1/completions", response_model=CompletionResponse, responses=_ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue each prompt. With `stream`, the text comes as server-sent events, ended by `data: [DONE]`."""
        answer = await while_connected(request, _complete(_model(request), body, request))
        return answer or Response(status_code=CLIENT_GONE)

    @api.get("/v1/models", responses=_ERRORS)
    async def models(request: Request) -> ModelList:
        """List what can be asked for: each model by its name, by its aliases, and by exact versions."""
        return ModelList(data=cards(await _model(request).table()))

    @api.get("/v1/models/{name:path}", responses=_ERRORS)
    async def model_card(name: str, request: Request) -> ModelCard:
        """Describe one of the models that `GET /v1/models` lists."""
        table = await _model(request).table()
        card = next((card for card in cards(table) if card.id == name), None)
        if card is None:
            raise not_served(table, name)
        return card

    @api.get("/health")
    async def health() -> Health:
        """Return 200: this process answers. Whether the models can, `GET /ready` tells."""
        return Health()

    @api.get("/ready", responses=_ERRORS)
    async def is_ready(request: Request) -> Ready:
        """Return 200 while every model has a replica that can answer, else 503 with what is missing."""
        return ready(_model(request).known)

    @api.get("/", include_in_schema=False)
    async def playground() -> HTMLResponse:
        return HTMLResponse(page)

    api.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    api.add_middleware(PanicsAsErrors)
    api.add_exception_handler(ApiError, _on_api_error)
    api.add_exception_handler(RequestValidationError, _on_validation_error)
    api.add_exception_handler(HTTPException, _on_http_exception)
    api.add_exception_handler(Exception, _on_bug)
    return api


def _model(request: Request) -> ModelClient:
    model: ModelClient = request.app.state.model
    return model


async def _complete(model: ModelClient, body: CompletionRequest, request: Request) -> Response:
    session = request.headers.get("x-session-id") or body.session
    events = model.generate(
        GenerationRequest(body.model, body.prompts, body.sampling_params(), body.echo, session)
    )
    if (metrics := request.app.state.metrics) is not None:
        events = metrics.measured(events)
    try:
        # An error before the first event still has an HTTP status.
        accepted = await anext(events)
        assert isinstance(accepted, Accepted)
        headers = {VERSION_HEADER: accepted.ref}
        writer = CompletionWriter(body, accepted)
        if body.stream:
            return EventStream(writer.stream(events), headers)
        whole = await writer.whole(events)
        return Response(whole.model_dump_json(), headers=headers, media_type="application/json")
    except BaseException:
        await events.aclose()
        raise


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(validation_error(error.errors()))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; GET /docs lists the endpoints"
    return error_response(ApiError(error.status_code, message))


async def _on_bug(request: Request, error: Exception) -> Response:
    # Starlette raises it again after the response, so it is in the log with its traceback.
    return error_response(ApiError(500, INTERNAL_ERROR))
