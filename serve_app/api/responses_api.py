"""`POST /v1/responses`."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response

from serve_app.api.generating import ERRORS, respond, session_of
from serve_app.api.responses_writer import ResponsesWriter
from serve_app.protocol.responses_api import ResponsesRequest, ResponsesResponse


def add_routes(api: FastAPI) -> None:
    """Add the route of responses."""

    @api.post("/v1/responses", response_model=ResponsesResponse, responses=ERRORS)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation, as chat completions do. With `stream`, the text comes as typed events."""
        return await respond(
            request,
            body.generation_request(session_of(request, body.session)),
            lambda accepted: ResponsesWriter(body, accepted),
            stream=body.stream,
        )
