"""`POST /v1/chat/completions`."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response

from serve_app.api.chat_writer import ChatWriter
from serve_app.api.generating import ERRORS, respond, session_of
from serve_app.protocol.chat import ChatRequest, ChatResponse


def add_routes(api: FastAPI) -> None:
    """Add the route of chat completions."""

    @api.post("/v1/chat/completions", response_model=ChatResponse, responses=ERRORS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation. With `stream`, the text comes as server-sent events, ended by `data: [DONE]`."""
        generation = body.generation_request(session_of(request, body.session))
        return await respond(
            request, generation, lambda accepted: ChatWriter(body, accepted), stream=body.stream
        )
