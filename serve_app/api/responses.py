"""The events of one request as an HTTP response: whole, or as server-sent events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve_app.errors import ApiError
from serve_app.protocol.completions import Choice, CompletionRequest, CompletionResponse, Usage
from serve_app.routing.client import Events
from serve_app.streams.messages import ChoiceDelta, Started


class CompletionWriter:
    """Writes the response to `request` from the events that follow `started`."""

    def __init__(self, request: CompletionRequest, started: Started) -> None:
        self._prompt_tokens, self._completion_tokens = started.prompt_tokens, 0
        options = request.stream_options
        self._include_usage = options is not None and options.include_usage
        self._empty_response = CompletionResponse(
            id=f"cmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model,
            system_fingerprint=started.model.ref,
            choices=[],
        )

    async def whole(self, events: Events) -> CompletionResponse:
        """Return the response once it is complete."""
        choices = [_choice(delta) async for event in events for delta in self._count(event)]
        return self._empty_response.model_copy(update={"choices": choices, "usage": self._usage()})

    async def stream(self, events: Events) -> AsyncGenerator[str]:
        """Yield server-sent events, one per delta; those that are ready at the same moment as one string."""
        async with aclosing(events):
            try:
                async for event in events:
                    chunks = [self._chunk(delta) for delta in self._count(event) if _has_content(delta)]
                    if chunks:
                        yield "".join(chunks)
                if self._include_usage:
                    last = self._empty_response.model_copy(update={"usage": self._usage()})
                    yield _server_sent_event(last.model_dump_json())
            except ApiError as error:
                yield _server_sent_event(error.response.model_dump_json())
        yield _server_sent_event("[DONE]")

    def _count(self, event: Started | list[ChoiceDelta]) -> list[ChoiceDelta]:
        """Add the deltas' tokens to the usage, and return the deltas."""
        assert isinstance(event, list)
        self._completion_tokens += sum(delta.tokens for delta in event)
        return event

    def _chunk(self, delta: ChoiceDelta) -> str:
        chunk = self._empty_response.model_copy(update={"choices": [_choice(delta)]})
        # As in OpenAI's streams, `usage` is null if a last chunk will have the counts, and absent otherwise.
        return _server_sent_event(chunk.model_dump_json(exclude=None if self._include_usage else {"usage"}))

    def _usage(self) -> Usage:
        return Usage.of(self._prompt_tokens, self._completion_tokens)


class EventStream(StreamingResponse):
    """Server-sent events whose source is closed as soon as the client goes away, not when it is collected."""

    def __init__(self, events: AsyncGenerator[str]) -> None:
        # A proxy that buffers would hold the text back until its buffer is full.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, as an ASGI application."""
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


def _has_content(delta: ChoiceDelta) -> bool:
    return bool(delta.text or delta.logprobs or delta.finish_reason)


def _choice(delta: ChoiceDelta) -> Choice:
    return Choice(
        index=delta.index, text=delta.text, logprobs=delta.logprobs, finish_reason=delta.finish_reason
    )


def _server_sent_event(data: str) -> str:
    return f"data: {data}\n\n"
