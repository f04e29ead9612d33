"""The events of one request as an HTTP response: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.api.chunks import ChunkWriter
from serve_app.api.disconnect import until_disconnected
from serve_app.errors import ApiError
from serve_app.protocol.completions import Choice, CompletionRequest, CompletionResponse, prompt_logprobs
from serve_app.protocol.sampling import Usage
from serve_app.routing.client import Accepted, Events
from serve_app.streams.messages import ChoiceDelta

VERSION_HEADER = "x-model-version"
"""Names the exact version that answers, as `system_fingerprint` does in the body."""


class CompletionWriter:
    """Writes the response to `request` from the events that follow `accepted`."""

    def __init__(self, request: CompletionRequest, accepted: Accepted) -> None:
        self._prompt_tokens = accepted.prompt_tokens
        self._completion_tokens = self._cached_tokens = 0
        # By choice: what has not been sent yet.
        self._prompt_ids = _by_choice(accepted.prompt_ids, request.n)
        self._token_ids = request.return_token_ids
        options = request.stream_options
        self._include_usage = options is not None and options.include_usage
        self._counts = options is not None and options.continuous_usage_stats
        self._empty_response = CompletionResponse(
            id=f"cmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model,
            system_fingerprint=accepted.ref,
            choices=[],
        )

    async def whole(self, events: Events) -> str:
        """Return the response once it is complete, as JSON."""
        by_choice: dict[int, list[ChoiceDelta]] = defaultdict(list)
        async for event in events:
            for delta in self._count(event):
                by_choice[delta.index].append(delta)
        choices = [self._choice(ChoiceDelta.joined(by_choice[index])) for index in sorted(by_choice)]
        whole = self._empty_response.model_copy(update={"choices": choices, "usage": self._usage()})
        return whole.model_dump_json()

    async def stream(self, events: Events) -> AsyncGenerator[bytes]:
        """Yield server-sent events, one per delta; those that are ready at the same moment together."""
        writer = ChunkWriter(self._empty_response, usage=self._include_usage, token_ids=self._token_ids)
        async with aclosing(events):
            try:
                async for event in events:
                    deltas = self._count(event)
                    usage = self._usage().model_dump_json() if self._counts else None
                    chunks = [
                        writer.chunk(delta, self._prompt_ids.pop(delta.index, None), usage)
                        for delta in deltas
                        if self._has_content(delta)
                    ]
                    if chunks:
                        yield b"".join(chunks)
                if self._include_usage:
                    last = self._empty_response.model_copy(update={"usage": self._usage()})
                    yield _server_sent_event(last.model_dump_json())
            except ApiError as error:
                yield _server_sent_event(error.response.model_dump_json())
        yield _server_sent_event("[DONE]")

    def _count(self, event: Accepted | list[ChoiceDelta]) -> list[ChoiceDelta]:
        """Add the deltas' tokens to the usage, and return the deltas."""
        assert isinstance(event, list)
        for delta in event:
            self._completion_tokens += len(delta.token_ids)
            self._cached_tokens += delta.cached_tokens
        return event

    def _usage(self) -> Usage:
        return Usage.of(self._prompt_tokens, self._completion_tokens, self._cached_tokens)

    def _has_content(self, delta: ChoiceDelta) -> bool:
        return bool(
            delta.text
            or delta.logprobs
            or delta.finish_reason
            or delta.prompt_logprobs is not None
            or (self._token_ids and delta.token_ids)
        )

    def _choice(self, delta: ChoiceDelta) -> Choice:
        return Choice(
            index=delta.index,
            text=delta.text,
            logprobs=delta.logprobs,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._token_ids else None,
            prompt_token_ids=self._prompt_ids.get(delta.index),
            prompt_logprobs=None if delta.prompt_logprobs is None else prompt_logprobs(delta.prompt_logprobs),
        )


class EventStream(Response):
    """Server-sent events whose source is closed as soon as the client goes away, not when it is collected."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], headers: dict[str, str]) -> None:
        # A proxy that buffers would hold the text back until its buffer is full.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | headers
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, as an ASGI application."""
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(until_disconnected(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            sending.cancel()
            await asyncio.wait((sending,))
        if not sending.cancelled():
            sending.result()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _by_choice(prompt_ids: list[list[int]] | None, n: int) -> dict[int, list[int]]:
    """Return the token ids of the prompt of each choice; none if they are not wanted."""
    return {i * n + j: ids for i, ids in enumerate(prompt_ids or ()) for j in range(n)}


def _server_sent_event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
