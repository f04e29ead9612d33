"""HTTP in front of the model replicas: OpenAI's completions API, the playground, health."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from serve_app.api.middleware import BodyLimit, PanicsAsErrors
from serve_app.api.responses import CompletionWriter, EventStream
from serve_app.errors import INTERNAL_ERROR, ApiError, ErrorResponse, error_response, validation_error
from serve_app.protocol.completions import CompletionRequest, CompletionResponse, Health, ModelCard, ModelList
from serve_app.routing.client import ModelClient, ReplicaClient
from serve_app.streams.messages import Started

MAX_BODY_BYTES = 8 * 2**20
"""Default limit of a body: the token ids of more than a million tokens."""
_PLAYGROUND = Path(__file__).parent / "playground" / "index.html"
# Otherwise FastAPI documents its own error object, with status 422.
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 404, 413, 422, 429, 500, 503)
}


class Api:
    """The deployment that receives HTTP requests; `handle` leads to the model replicas."""

    def __init__(self, handle: DeploymentHandle[Any], max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._client, self._max_body_bytes = ReplicaClient(handle), max_body_bytes

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the application where it runs, so that it need not be pickled. Ray Serve calls this."""
        api = create_api(self._client, self._max_body_bytes)
        # What is loaded by now stays. Otherwise the garbage collector looks at all of it, again and again, while a body
        # of a million small lists is parsed: 2 s instead of 0.6.
        gc.collect()
        gc.freeze()
        return api


def create_api(model: ModelClient, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """Return the HTTP application in front of `model`; a larger body than `max_body_bytes` is refused."""
    api = FastAPI(
        title="llama_ray",
        description="A LLaMA model behind OpenAI's completions API. `GET /` is a playground.",
        redoc_url=None,
    )
    page = _PLAYGROUND.read_text(encoding="utf-8")

    @api.post("/v1/completions", response_model=CompletionResponse, responses=_ERRORS)
    async def completions(body: CompletionRequest) -> Response:
        """Continue each prompt. With `stream`, the text comes as server-sent events, ended by `data: [DONE]`."""
        return await _complete(model, body)

    @api.get("/v1/models", responses=_ERRORS)
    async def models() -> ModelList:
        """List the model that is served, by its registered name and by its exact version."""
        return ModelList(data=ModelCard.of(await model.info()))

    @api.get("/v1/models/{name:path}", responses=_ERRORS)
    async def model_card(name: str) -> ModelCard:
        """Describe one of the models that `GET /v1/models` lists."""
        info = await model.info()
        for card in ModelCard.of(info):
            if card.id == name:
                return card
        raise ApiError(404, info.not_served(name), param="model", code="model_not_found")

    @api.get("/health", responses=_ERRORS)
    async def health() -> Health:
        """Return 200 while the model can answer ("busy": it has more work than it can do at once), else 503."""
        return await model.check()

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


async def _complete(model: ModelClient, body: CompletionRequest) -> Response:
    events = model.generate(body.generation_request())
    try:
        # An error before the first event still has an HTTP status.
        started = await anext(events)
        assert isinstance(started, Started)
        writer = CompletionWriter(body, started)
        if body.stream:
            return EventStream(writer.stream(events))
        whole = await writer.whole(events)
        return Response(whole.model_dump_json(), media_type="application/json")
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
