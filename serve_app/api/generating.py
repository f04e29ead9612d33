"""What all routes have in common that generate text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response

from llama_ray.data.chat.template import ChatPrompt
from serve_app.api.disconnect import while_connected
from serve_app.api.responses import VERSION_HEADER, EventStream
from serve_app.errors import ErrorResponse
from serve_app.protocol.generation import GenerationRequest
from serve_app.routing.client import Accepted, Events, ModelClient

TEMPLATE_HEADER = "x-chat-template"
"""Says what a conversation was rendered with: "from the checkpoint", or "plain" for a model without a template."""
# Otherwise FastAPI documents its own error object, with status 422.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 422, 429, 500, 503)
}


class Writer(Protocol):
    """Writes the events that follow the acceptance of a request."""

    async def whole(self, events: Events) -> str:
        """Return the JSON of the response once it is complete."""

    def stream(self, events: Events) -> AsyncGenerator[bytes]:
        """Yield server-sent events."""


def models_of(request: Request) -> ModelClient:
    """Return the client of the models that the application was made with."""
    client: ModelClient = request.app.state.models
    return client


def session_of(request: Request, of_body: str | None) -> str | None:
    """Return what groups requests that one version is to answer: the header, else what the body says."""
    return request.headers.get("x-session-id") or of_body


async def respond(
    request: Request, generation: GenerationRequest, writer: Callable[[Accepted], Writer], *, stream: bool
) -> Response:
    """Have a request answered, while its client is there, with what `writer` makes of the events."""
    return await while_connected(request, _answer(request, generation, writer, stream))


async def _answer(
    request: Request, generation: GenerationRequest, writer: Callable[[Accepted], Writer], stream: bool
) -> Response:
    events = models_of(request).generate(generation)
    if (metrics := request.app.state.metrics) is not None:
        events = metrics.measured(events)
    try:
        # An error before the first event still has an HTTP status.
        accepted = await anext(events)
        assert isinstance(accepted, Accepted)
        headers = {VERSION_HEADER: accepted.ref} | _notes(request, generation, accepted)
        if stream:
            return EventStream(writer(accepted).stream(events), headers)
        whole = await writer(accepted).whole(events)
        return Response(whole, headers=headers, media_type="application/json")
    except BaseException:
        await events.aclose()
        raise


def _notes(request: Request, generation: GenerationRequest, accepted: Accepted) -> dict[str, str]:
    """Return the header that says whether a conversation became a prompt by the model's own template."""
    table = models_of(request).known
    is_chat = any(isinstance(prompt, ChatPrompt) for prompt in generation.prompts)
    # An adapter may have a template of its own.
    if table is None or not is_chat or accepted.with_adapter:
        return {}
    known = (model.status(accepted.ref) for model in table.models)
    info = next((status.info for status in known if status is not None), None)
    return {} if info is None else {TEMPLATE_HEADER: info.chat_template}
