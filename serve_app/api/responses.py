"""The response to a request for completions, and how any stream of events is sent."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.api.chunks import ChunkWriter
from serve_app.api.disconnect import until_disconnected
from serve_app.api.writer import ChunkedWriter, server_sent_event
from serve_app.protocol.completions import Choice, CompletionRequest, CompletionResponse, prompt_logprobs
from serve_app.routing.client import Accepted
from serve_app.streams.messages import ChoiceDelta

VERSION_HEADER = "x-model-version"
"""Names the exact version that answers, as `system_fingerprint` does in the body."""


class CompletionWriter(ChunkedWriter):
    """Writes the response to `request`."""

    def __init__(self, request: CompletionRequest, accepted: Accepted) -> None:
        super().__init__(accepted, request.stream_options)
        # By choice: what has not been sent yet.
        self._prompt_ids = _by_choice(accepted.prompt_ids, request.n)
        self._token_ids = request.return_token_ids
        self._empty_response = CompletionResponse(
            id=f"cmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model,
            system_fingerprint=accepted.ref,
            choices=[],
        )
        self._chunks = ChunkWriter(self._empty_response, usage=self.include_usage, token_ids=self._token_ids)

    def response(self, choices: list[ChoiceDelta]) -> str:
        """See `DeltaWriter`."""
        fields = {"choices": [self._choice(delta) for delta in choices], "usage": self.usage()}
        return self._empty_response.model_copy(update=fields).model_dump_json()

    def chunk(self, delta: ChoiceDelta, usage: str | None) -> bytes:
        """See `DeltaWriter`."""
        return self._chunks.chunk(delta, self._prompt_ids.pop(delta.index, None), usage)

    def usage_chunk(self) -> bytes:
        """See `ChunkedWriter`."""
        last = self._empty_response.model_copy(update={"usage": self.usage()})
        return server_sent_event(last.model_dump_json())

    def has_content(self, delta: ChoiceDelta) -> bool:
        """See `DeltaWriter`."""
        return (
            super().has_content(delta)
            or delta.prompt_logprobs is not None
            or bool(self._token_ids and delta.token_ids)
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
