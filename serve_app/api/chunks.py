"""JSON of completion chunks, written by hand: a stream has one for each token, and pydantic takes ten times as long."""

from __future__ import annotations

import json
from json.encoder import encode_basestring, encode_basestring_ascii

from serve_app.protocol.completions import CompletionResponse
from serve_app.streams.messages import ChoiceDelta, Logprobs


class ChunkWriter:
    """Writes the server-sent events of one response whose common fields are those of `empty`.

    With `usage` every chunk has `"usage": null`, as in OpenAI's streams that end with the counts.
    """

    def __init__(self, empty: CompletionResponse, *, usage: bool) -> None:
        common = empty.model_dump_json(exclude={"choices", "usage"}).removesuffix("}")
        self._head = f'data: {common},"choices":['.encode()
        self._tail = b',"usage":null}\n\n' if usage else b"}\n\n"

    def chunk(self, delta: ChoiceDelta) -> bytes:
        """Return the event for what was added to one choice."""
        return self._head + _choice(delta) + b"]" + self._tail


def _choice(delta: ChoiceDelta) -> bytes:
    finish = "null" if delta.finish_reason is None else f'"{delta.finish_reason}"'
    head = f'{{"index":{delta.index},"text":'.encode()
    return (
        head
        + _text(delta.text)
        + f',"logprobs":{_logprobs(delta.logprobs)},"finish_reason":{finish}}}'.encode()
    )


def _text(text: str) -> bytes:
    try:
        return encode_basestring(text).encode()
    except UnicodeEncodeError:
        # An echoed prompt may hold lone surrogates.
        return encode_basestring_ascii(text).encode()


def _logprobs(logprobs: Logprobs | None) -> str:
    if logprobs is None:
        return "null"
    # NaN and infinity are no JSON.
    return json.dumps(vars(logprobs), separators=(",", ":"), allow_nan=False)
