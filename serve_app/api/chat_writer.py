"""Writes the response to a chat request: whole, or in chunks, by hand as for completions."""

from __future__ import annotations

import time
import uuid
from typing import Any

from serve_app.api.chunks import json_bytes, json_text
from serve_app.api.writer import ChunkedWriter, server_sent_event
from serve_app.protocol.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatRequest,
    ChatResponse,
    ChoiceLogprobs,
)
from serve_app.routing.client import Accepted
from serve_app.streams.messages import ChoiceDelta, Logprobs


class ChatWriter(ChunkedWriter):
    """Writes the response to `request`.

    In a stream the role, text and reason for the end of a choice are chunks of their own: clients rely on it.
    """

    def __init__(self, request: ChatRequest, accepted: Accepted) -> None:
        super().__init__(accepted, request.stream_options)
        self._top = request.top_logprobs or 0
        self._empty_chunk = ChatChunk(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model,
            system_fingerprint=accepted.ref,
            choices=[],
        )
        head = self._empty_chunk.model_dump_json(exclude={"choices", "usage"}).removesuffix("}")
        self._head = f'data: {head},"choices":['.encode()
        self._tail = b'],"usage":null}\n\n' if self.include_usage else b"]}\n\n"
        self._begun: set[int] = set()

    def response(self, choices: list[ChoiceDelta]) -> str:
        """See `DeltaWriter`."""
        empty = self._empty_chunk
        whole = ChatResponse(
            id=empty.id,
            created=empty.created,
            model=empty.model,
            system_fingerprint=empty.system_fingerprint,
            choices=[self._whole_choice(delta) for delta in choices],
            usage=self.usage(),
        )
        return whole.model_dump_json()

    def chunk(self, delta: ChoiceDelta, usage: str | None) -> bytes:
        """See `DeltaWriter`."""
        tail = self._tail if usage is None else f'],"usage":{usage}}}\n\n'.encode()
        choices = list[bytes]()
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            choices.append(_choice(delta.index, b'{"role":"assistant","content":""}'))
        if delta.text or delta.logprobs:
            content = b'{"content":' + json_text(delta.text) + b"}"
            choices.append(_choice(delta.index, content, self._logprobs(delta.logprobs)))
        if delta.finish_reason is not None:
            choices.append(_choice(delta.index, b"{}", finish=f'"{delta.finish_reason}"'.encode()))
        return b"".join([self._head + choice + tail for choice in choices])

    def usage_chunk(self) -> bytes:
        """See `ChunkedWriter`."""
        last = self._empty_chunk.model_copy(update={"usage": self.usage()})
        return server_sent_event(last.model_dump_json())

    def _logprobs(self, logprobs: Logprobs | None) -> bytes:
        if logprobs is None:
            return b"null"
        return b'{"content":' + json_bytes(token_logprobs(logprobs, self._top)) + b',"refusal":null}'

    def _whole_choice(self, delta: ChoiceDelta) -> ChatChoice:
        logprobs = None
        if delta.logprobs is not None:
            logprobs = ChoiceLogprobs.model_validate({"content": token_logprobs(delta.logprobs, self._top)})
        return ChatChoice(
            index=delta.index,
            message=AnswerMessage(content=delta.text),
            logprobs=logprobs,
            finish_reason=delta.finish_reason or "stop",
        )


def _choice(index: int, delta: bytes, logprobs: bytes = b"null", finish: bytes = b"null") -> bytes:
    return b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}' % (index, delta, logprobs, finish)


def token_logprobs(logprobs: Logprobs, top: int) -> list[dict[str, Any]]:
    """Return an entry for each token, whose names are bytes, with the `top` likeliest ones, as OpenAI has them."""
    rows = zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    return [
        {**_entry(token, logprob), "top_logprobs": [_entry(*other) for other in _likeliest(others, top)]}
        for token, logprob, others in rows
        if logprob is not None and others is not None
    ]


def _likeliest(others: dict[str, float], top: int) -> list[tuple[str, float]]:
    # The sampled token is there, too, even if it is none of the likeliest.
    return sorted(others.items(), key=lambda entry: -entry[1])[:top]


def _entry(name: str, logprob: float) -> dict[str, Any]:
    content = bytes.fromhex(name.partition(":")[0])
    # Part of a character is written as OpenAI does: \\xe2.
    return {"token": content.decode(errors="backslashreplace"), "logprob": logprob, "bytes": list(content)}
