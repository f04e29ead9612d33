"""`POST /v1/completions`."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response

from serve_app.api.generating import ERRORS, respond, session_of
from serve_app.api.responses import CompletionWriter
from serve_app.protocol.completions import CompletionRequest, CompletionResponse


def add_routes(api: FastAPI) -> None:
    """Add the route of completions."""

    @api.post("/v1/completions", response_model=CompletionResponse, responses=ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue each prompt. With `stream`, the text comes as server-sent events, ended by `data: [DONE]`."""
        generation = body.generation_request(session_of(request, body.session))
        return await respond(
            request, generation, lambda accepted: CompletionWriter(body, accepted), stream=body.stream
        )
