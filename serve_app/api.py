"""HTTP in front of the model replicas: OpenAI's completions API, the playground, health."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import ReplicaState  # type: ignore[attr-defined]
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from serve_app.events import Failure, Job, ModelInfo, Piece, Started
from serve_app.protocol import (
    ApiError,
    Choice,
    Completion,
    CompletionRequest,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    Usage,
    validation_error,
)

PROBE_TIMEOUT_S = 0.5  # below the second that load balancers commonly wait for /health

Events = AsyncGenerator[Started | list[Piece]]


class Model(Protocol):
    """What the API needs of a model, wherever it runs. Whatever goes wrong is an ApiError."""

    async def info(self) -> ModelInfo:
        """Which model is served."""

    async def check(self) -> Health:
        """Raise ApiError (503) unless the model can answer."""

    def generate(self, job: Job) -> Events:
        """`Started`, then lists of pieces; closing the iterator frees all that the job holds."""


def create_api(model: Model) -> FastAPI:
    """The HTTP application in front of `model`."""
    api = FastAPI(
        title="llama_ray", description="LLaMA models behind OpenAI's completions API.", redoc_url=None
    )
    # Otherwise FastAPI documents its own shape, with status 422.
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (400, 404, 422, 429, 500, 503)
    }
    page = (Path(__file__).parent / "playground" / "index.html").read_text(encoding="utf-8")

    @api.post("/v1/completions", response_model=Completion, responses=errors)
    async def completions(body: CompletionRequest) -> Response:
        """Continue each prompt; with `stream` as server-sent events, ended by `data: [DONE]`."""
        events = model.generate(body.job())
        try:
            started = await anext(events)  # an error up to here has a status of its own
            assert isinstance(started, Started)
            answer = _Answer(body, started)
            if body.stream:
                return _EventStream(answer.stream(events))
            return Response((await answer.complete(events)).model_dump_json(), media_type="application/json")
        except BaseException:
            await events.aclose()
            raise

    @api.get("/v1/models", responses=errors)
    async def models() -> ModelList:
        """The model that is served, by its registered name and by its exact version."""
        return ModelList(data=ModelCard.of(await model.info()))

    @api.get("/v1/models/{name:path}", responses=errors)
    async def model_card(name: str) -> ModelCard:
        """One of the models that `GET /v1/models` lists."""
        cards = {card.id: card for card in ModelCard.of(await model.info())}
        if name not in cards:
            message = f"model {name!r} is not served here; there is {' and '.join(map(repr, cards))}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return cards[name]

    @api.get("/health", responses=errors)
    async def health() -> Health:
        """200 while the model can answer ("busy": it has more work than it can take at once), else 503."""
        return await model.check()

    @api.get("/", include_in_schema=False)
    async def playground() -> HTMLResponse:
        return HTMLResponse(page)

    api.add_exception_handler(ApiError, _on_api_error)
    api.add_exception_handler(RequestValidationError, _on_validation_error)
    api.add_exception_handler(HTTPException, _on_http_exception)
    api.add_exception_handler(Exception, _on_bug)
    return api


class ServedModel:
    """The replicas of the deployment behind `handle`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def info(self) -> ModelInfo:
        """Which model one of the replicas serves."""
        try:
            info: ModelInfo = await self._handle.info.remote()
        except (RayError, RayServeException) as e:
            raise _unavailable(e) from e
        return info

    async def check(self) -> Health:
        """Ask a replica. Where none answers in time, the controller, which checks all of them, has the say."""
        try:
            await asyncio.wait_for(self._handle.info.remote(), PROBE_TIMEOUT_S)
        except (TimeoutError, BackPressureError, DeploymentUnavailableError) as e:
            status = await asyncio.to_thread(serve.status)
            deployment = status.applications[self._handle.app_name].deployments[self._handle.deployment_name]
            if deployment.replica_states.get(ReplicaState.RUNNING):
                return Health(status="busy")
            raise _unavailable(e, deployment.message or "it is starting") from e
        except (RayError, RayServeException) as e:
            raise _unavailable(e) from e
        return Health(status="ok")

    async def generate(self, job: Job) -> Events:
        """See `Model`. A replica that is lost ends the job with an ApiError, also in the middle of a text."""
        response = self._handle.options(stream=True).generate.remote(job)
        assert isinstance(response, DeploymentResponseGenerator)
        try:
            async for event in response:
                if isinstance(event, Failure):
                    raise ApiError(event.status, event.message, param=event.param, code=event.code)
                yield event
        except (RayError, RayServeException) as e:
            raise _unavailable(e) from e
        except (GeneratorExit, asyncio.CancelledError):  # nobody listens any more
            response.cancel()  # type: ignore[no-untyped-call]
            raise


class Api:
    """The deployment that takes HTTP requests in; `handle` leads to the model replicas."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._model = ServedModel(handle)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve in the replica, so that the application need not be pickled."""
        return create_api(self._model)


class _Answer:
    """One response in the making."""

    def __init__(self, request: CompletionRequest, started: Started) -> None:
        self._prompt_tokens, self._tokens = started.prompt_tokens, 0
        self._choices = len(request.prompts) * request.n
        options = request.stream_options
        self._include_usage = options is not None and options.include_usage
        self._response = Completion(
            id=f"cmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model,
            system_fingerprint=started.model.ref,
            choices=[],
        )

    async def complete(self, events: Events) -> Completion:
        """The whole answer at once."""
        choices = [_choice(piece) async for event in events for piece in self._counted(event)]
        return self._response.model_copy(update={"choices": choices, "usage": self._usage()})

    async def stream(self, events: Events) -> AsyncGenerator[str]:
        """The answer as server-sent events, one a choice and piece; those of one moment in one string."""
        async with aclosing(events):
            try:
                async for event in events:
                    chunks = [self._chunk(piece) for piece in self._counted(event) if _says_something(piece)]
                    if chunks:
                        yield "".join(chunks)
                if self._include_usage:
                    last = self._response.model_copy(update={"usage": self._usage()})
                    yield _sse(last.model_dump_json())
            except ApiError as e:
                yield _sse(e.response.model_dump_json())
        yield _sse("[DONE]")

    def _counted(self, event: Started | list[Piece]) -> list[Piece]:
        assert isinstance(event, list)
        self._tokens += sum(piece.tokens for piece in event)
        return event

    def _chunk(self, piece: Piece) -> str:
        chunk = self._response.model_copy(update={"choices": [_choice(piece)]})
        # OpenAI's chunks have "usage": null where a last one will have the counts, and no such field otherwise.
        return _sse(chunk.model_dump_json(exclude=None if self._include_usage else {"usage"}))

    def _usage(self) -> Usage:
        return Usage.of(self._prompt_tokens, self._tokens)


class _EventStream(StreamingResponse):
    """Server-sent events whose source is closed at once when the client goes away, not when it is collected."""

    def __init__(self, events: AsyncGenerator[str]) -> None:
        # A buffering proxy in between would hold the text back until it has enough.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


def _says_something(piece: Piece) -> bool:
    return bool(piece.text or piece.logprobs or piece.finish_reason)


def _choice(piece: Piece) -> Choice:
    return Choice(
        index=piece.index, text=piece.text, logprobs=piece.logprobs, finish_reason=piece.finish_reason
    )


def _sse(data: str) -> str:
    return f"data: {data}\n\n"


def _unavailable(error: Exception, reason: str | None = None) -> ApiError:
    if isinstance(error, BackPressureError) and reason is None:
        return ApiError(
            429,
            "the server has more requests than it can queue; try again later",
            code="overloaded",
            retry_after_s=1,
        )
    if isinstance(error, DeploymentUnavailableError):
        reason = reason or "it failed to deploy; GET /health says why"
    elif isinstance(error, RayActorError):
        reason = "the replica that was to answer has died; send the request again"
    # Ray's reports end with the error itself, after a traceback that is nothing for the client.
    last = (reason or str(error) or type(error).__name__).strip().splitlines()[-1]
    return ApiError(503, f"the model is not available: {last}", code="unavailable", retry_after_s=5)


def _error_response(error: ApiError) -> JSONResponse:
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else None
    return JSONResponse(error.response.model_dump(), error.status, headers)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _error_response(validation_error(error.errors()))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; see /docs for what there is"
    return _error_response(ApiError(error.status_code, message))


async def _on_bug(request: Request, error: Exception) -> Response:
    # Starlette raises it again after the response, so that it is in the log with its traceback.
    return _error_response(ApiError(500, "an internal error, see the server's log"))
