"""Writes the response to a request of the Responses API: whole, or as its sequence of events."""

from __future__ import annotations

import time
import uuid
from typing import Any

from serve_app.api.chat_writer import token_logprobs
from serve_app.api.chunks import json_bytes, json_text
from serve_app.api.writer import DeltaWriter
from serve_app.errors import ApiError
from serve_app.protocol.responses_api import (
    FailureDetails,
    IncompleteDetails,
    OutputMessage,
    OutputText,
    ResponsesRequest,
    ResponsesResponse,
    ResponsesUsage,
)
from serve_app.routing.client import Accepted
from serve_app.streams.messages import ChoiceDelta


class ResponsesWriter(DeltaWriter):
    """Writes the response to `request`, whose output is one message with one text."""

    def __init__(self, request: ResponsesRequest, accepted: Accepted) -> None:
        super().__init__(accepted, None)
        self._top = request.top_logprobs
        response_id, message_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._begun = ResponsesResponse.begun(request, response_id, int(time.time()), accepted.ref)
        self._message = OutputMessage(id=message_id, status="in_progress", content=[])
        self._place = {"item_id": message_id, "output_index": 0, "content_index": 0}
        self._sequence = 0
        # What an event of a delta has before and after what changes.
        self._delta_head = json_bytes({"type": "response.output_text.delta", **self._place})[:-1]
        self._parts: list[ChoiceDelta] = []

    def response(self, choices: list[ChoiceDelta]) -> str:
        """See `DeltaWriter`."""
        [delta] = choices
        return self._ended(delta).model_dump_json()

    def opening(self) -> bytes:
        """See `DeltaWriter`."""
        begun, part = self._begun.model_dump(mode="json"), OutputText(text="").model_dump()
        return b"".join(
            [
                self._event("response.created", response=begun),
                self._event("response.in_progress", response=begun),
                self._event("response.output_item.added", output_index=0, item=self._message.model_dump()),
                self._event("response.content_part.added", **self._place, part=part),
            ]
        )

    def chunk(self, delta: ChoiceDelta, usage: str | None) -> bytes:
        """See `DeltaWriter`."""
        self._parts.append(delta)
        if not (delta.text or delta.logprobs):
            return b""
        logprobs = b"[]" if delta.logprobs is None else json_bytes(token_logprobs(delta.logprobs, self._top))
        return (
            b'event: response.output_text.delta\ndata: %b,"delta":%b,"logprobs":%b,"sequence_number":%d}\n\n'
            % (
                self._delta_head,
                json_text(delta.text),
                logprobs,
                self._next(),
            )
        )

    def ending(self) -> bytes:
        """See `DeltaWriter`."""
        ended = self._ended(ChoiceDelta.joined(self._parts))
        [message] = ended.model_dump(mode="json")["output"]
        [part] = message["content"]
        text = {"text": part["text"], "logprobs": part["logprobs"]}
        return b"".join(
            [
                self._event("response.output_text.done", **self._place, **text),
                self._event("response.content_part.done", **self._place, part=part),
                self._event("response.output_item.done", output_index=0, item=message),
                self._event(f"response.{ended.status}", response=ended.model_dump(mode="json")),
            ]
        )

    def failing(self, error: ApiError) -> bytes:
        """See `DeltaWriter`."""
        body = error.response.error
        details = FailureDetails(code=body.code or "server_error", message=body.message)
        failed = self._begun.model_copy(update={"status": "failed", "error": details})
        return self._event("response.failed", response=failed.model_dump(mode="json"))

    def _ended(self, delta: ChoiceDelta) -> ResponsesResponse:
        """Return the response with its text; one that ends in the middle is incomplete, for the reason that it has."""
        complete = delta.finish_reason == "stop"
        status = "completed" if complete else "incomplete"
        reason = "max_output_tokens" if delta.finish_reason == "length" else delta.finish_reason or ""
        logprobs = [] if delta.logprobs is None else token_logprobs(delta.logprobs, self._top)
        text = OutputText.model_validate({"text": delta.text, "logprobs": logprobs})
        return self._begun.model_copy(
            update={
                "status": status,
                "incomplete_details": None if complete else IncompleteDetails(reason=reason),
                "output": [self._message.model_copy(update={"status": status, "content": [text]})],
                "usage": ResponsesUsage.of(self.usage()),
            }
        )

    def _event(self, type: str, **fields: Any) -> bytes:
        data = json_bytes({"type": type, **fields, "sequence_number": self._next()})
        return b"event: %b\ndata: %b\n\n" % (type.encode(), data)

    def _next(self) -> int:
        number, self._sequence = self._sequence, self._sequence + 1
        return number
